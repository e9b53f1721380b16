"""Training batches: an endless stream, the same whatever the number of workers or processes.

The stream is the source in the order of pass 0, then of pass 1, and so on. Step s takes the `batch_size` positions from
s * batch_size; where several processes train, each takes its part of them. So a batch is a function of (seed, step),
a source smaller than a batch simply comes round again, and to resume is to start at another step.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from fastmim.data.budget import Budget
from fastmim.data.config import DataConfig
from fastmim.data.draws import permutation
from fastmim.data.errors import DataError
from fastmim.data.pipeline import TrainRow
from fastmim.data.pixels import normalise
from fastmim.data.sources import Source
from fastmim.data.views import ViewSpec
from fastmim.data.workers import Batches, Task, create_batches

_log = logging.getLogger("fastmim.data")


@dataclass
class RawBatch:
    """This process's part of one batch.

    images: [B, C, H, W] float32 (normalised) or uint8, as `DataConfig.output` says.
    labels: [B] int64, or None where images have no labels.
    indices: [B] int64, the images in it, after replacements.
    replaced: unreadable images replaced since the start of the run, in this process's batches, this one included.
        An image that is met again counts again.
    views: the further views of the same images, by name, as `images` is; `images` is the first view.
    """

    images: Tensor
    labels: Tensor | None
    indices: Tensor
    replaced: int
    views: dict[str, Tensor] = field(default_factory=dict)


class Loader(Protocol):
    """What the trainer needs: any pipeline gives its batches in this way."""

    steps_per_epoch: int
    step: int  # the step whose batch comes next

    def __iter__(self) -> Iterator[RawBatch]: ...

    def __next__(self) -> RawBatch: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class TrainLoader:
    """Batches by Pillow or DALI, as `cfg.pipeline` says. An iterator and a context manager.

    Workers start with the first batch, `close` ends them.

    Args:
        source: the images.
        img_size: (height, width).
        batch_size: images of a step, over all processes.
        seed: with the step, decides everything.
        rank, world_size: which part of each batch is ours.
        start_step: first step to give.
        views: crops to make of every image, the first being `images`; one of `img_size` when empty.

    Raises:
        DataError: a batch that cannot be shared equally among the processes.
        BadDataError: from `next`, when more files were unreadable than the budget allows.
        WorkerError: from `next`, when a worker process failed.
    """

    def __init__(
        self,
        source: Source,
        cfg: DataConfig,
        img_size: tuple[int, int],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        views: Sequence[ViewSpec] = (),
    ) -> None:
        cfg.check()
        if batch_size < 1 or batch_size % world_size:
            raise DataError(
                f"batch_size must be a positive multiple of the {world_size} process{'es' if world_size > 1 else ''}; "
                f"got {batch_size}."
            )
        self.source = source
        self.mean, self.std = source.mean, source.std
        self.steps_per_epoch = max(1, len(source) // batch_size)
        self.step = start_step
        self.workers = workers_for(source, cfg)
        self._output = cfg.output
        self._batch_size = batch_size
        self._share = batch_size // world_size
        self._first = rank * self._share
        self._ahead = cfg.prefetch
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(seed, epoch, len(source)))
        self._pipeline, self._interpolation = cfg.pipeline, cfg.interpolation
        self._make = TrainRow(source, cfg, img_size, seed, views)
        self._shapes = {view.name: (source.in_chans, *view.size) for view in self._make.views}
        flat = (sum(int(np.prod(shape)) for shape in self._shapes.values()),)
        self._shape = (self._share, *((source.in_chans, *img_size) if len(self._shapes) == 1 else flat))
        self._budget = Budget(source, cfg)
        self._batches: Batches | None = None
        self._asked = start_step

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RawBatch:
        if self._batches is None:
            self._batches = self._start()
            self._asked = self.step
        while self._asked < self.step + self._batches.ahead:
            self._batches.ask(self._tasks(self._asked))
            self._asked += 1
        pixels, made = self._batches.take()
        self.step += 1
        for row in made:
            self._budget.record(row)
        indices = np.array([row.image for row in made], dtype=np.int64)
        labels = None if self.source.labels is None else torch.from_numpy(self.source.labels[indices])
        images, *others = self._views(torch.from_numpy(pixels))
        views = dict(zip(list(self._shapes)[1:], others, strict=True))
        return RawBatch(images, labels, torch.from_numpy(indices), self._budget.replaced, views)

    def _start(self) -> Batches:
        if self._pipeline == "dali":
            from fastmim.data.dali import DaliRows

            return DaliRows(self._make, self._shape, self.workers, self._interpolation)
        return create_batches(self._make, self._shape, self.workers, self._ahead, self.source.path)

    def _views(self, rows: Tensor) -> list[Tensor]:
        """Every view of the batch, as a copy: the slot is filled again by the next call."""
        shapes = list(self._shapes.values())
        parts = rows.flatten(1).split([int(np.prod(shape)) for shape in shapes], dim=1)
        views = [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]
        if self._output == "float32":
            return [normalise(view, self.mean, self.std) for view in views]
        return [view.clone(memory_format=torch.contiguous_format) for view in views]

    def state(self) -> dict[str, Any]:
        """Where the stream stands: JSON; batches that were made ahead but not given count as not made."""
        return {"step": self.step, "images": len(self.source), **self._budget.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where `state()` was taken, in this or another process."""
        self.close()
        if state.get("images", len(self.source)) != len(self.source):
            _log.warning(
                "%s has %d images, but had %d when the run was saved: it goes on with other images than it would have",
                self.source.name,
                len(self.source),
                state["images"],
            )
        self.step = int(state["step"])
        self._budget.load_state(state)

    def close(self) -> None:
        """End the workers. The next `next` would start them again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tasks(self, step: int) -> list[Task]:
        positions = np.arange(self._share) + (step * self._batch_size + self._first)
        epochs, places = np.divmod(positions, len(self.source))
        return [(epoch, int(self._order(epoch)[place])) for epoch, place in zip(epochs.tolist(), places, strict=True)]


def create_loader(
    source: Source,
    cfg: DataConfig,
    img_size: tuple[int, int],
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    views: Sequence[ViewSpec] = (),
) -> Loader:
    """The training loader that `cfg` asks for; arguments as `TrainLoader` has them."""
    if cfg.pipeline == "auto" and not source.in_memory:
        _log.info("Images are read by Pillow, in workers that run ahead of training (data.pipeline: auto).")
    return TrainLoader(source, cfg, img_size, batch_size, seed, rank, world_size, start_step, views)


def workers_for(source: Source, cfg: DataConfig) -> int:
    """How many worker processes `cfg.workers` means on this machine, for each training process on it."""
    if cfg.workers != "auto":
        return cfg.workers
    if source.in_memory:
        return 0
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
