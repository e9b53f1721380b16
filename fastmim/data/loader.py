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
from fastmim.data.choice import Choice, Device, checked, choose_again, choose_pipeline, jpeg_share
from fastmim.data.config import DataConfig
from fastmim.data.draws import permutation
from fastmim.data.errors import DataError
from fastmim.data.pipeline import Made, TrainRow
from fastmim.data.pixels import normalise
from fastmim.data.sources import Source
from fastmim.data.views import ViewSpec
from fastmim.data.workers import Batches, Task, create_batches

_log = logging.getLogger("fastmim.data")


@dataclass
class RawBatch:
    """This process's part of one batch.

    images: [B, C, H, W] float32 (normalised) or uint8, as `DataConfig.output` says; on a GPU where DALI works there.
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

    def advice(self) -> str:
        """What to change where training waits for this loader: a phrase."""
        ...

    def close(self) -> None: ...


class _Views(Protocol):
    """Batches as tensors, made in the order in which they are asked for."""

    ahead: int  # how many batches may be asked for before one is taken

    def ask(self, tasks: Sequence[Task]) -> None: ...

    def take(self) -> tuple[list[Tensor], list[Made]]:
        """The views of the oldest batch asked for, and what became of its rows."""
        ...

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
        device: where training is.
        choice: the pipeline, where it was chosen before.

    Raises:
        DataError: a batch that cannot be shared equally among the processes, or DALI where it cannot be.
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
        device: torch.device | None = None,
        choice: Choice | None = None,
    ) -> None:
        cfg.check()
        if batch_size < 1 or batch_size % world_size:
            raise DataError(
                f"batch_size must be a positive multiple of the {world_size} process{'es' if world_size > 1 else ''}; "
                f"got {batch_size}."
            )
        if rank == 0:
            source.report()
        self.source = source
        self.mean, self.std = source.mean, source.std
        self.steps_per_epoch = max(1, len(source) // batch_size)
        self.step = start_step
        self.workers = workers_for(source, cfg)
        self._batch_size = batch_size
        self._share = batch_size // world_size
        self._first = rank * self._share
        self._order = lru_cache(maxsize=2)(lambda epoch: permutation(seed, epoch, len(source)))
        self._cfg, self._device = cfg, device or torch.device("cpu")
        self._training: Device = "gpu" if self._device.type == "cuda" else "cpu"
        self.choice = choose_pipeline(source, cfg, self._training) if choice is None else checked(choice)
        self._make = TrainRow(source, cfg, img_size, seed, views)
        self._budget = Budget(source, cfg)
        self._batches: _Views | None = None
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
        views, made = self._batches.take()
        self.step += 1
        for row in made:
            self._budget.record(row)
        indices = np.array([row.image for row in made], dtype=np.int64)
        labels = None if self.source.labels is None else torch.from_numpy(self.source.labels[indices])
        named = dict(zip([view.name for view in self._make.views[1:]], views[1:], strict=True))
        return RawBatch(views[0], labels, torch.from_numpy(indices), self._budget.replaced, named)

    def _start(self) -> _Views:
        cfg, source = self._cfg, self.source
        mean, std = (self.mean, self.std) if cfg.output == "float32" else (None, None)
        views = self._make.views
        shapes = [(source.in_chans, *view.size) for view in views]
        if self.choice.pipeline == "dali":
            from fastmim.data.dali import DaliBatches
            from fastmim.data.dali_graph import Graph

            graph = Graph(views, source.in_chans, cfg.interpolation, mean, std, self.choice.device)
            device = self._device if self.choice.device == "gpu" else torch.device("cpu")
            return DaliBatches(self._make, graph, self._share, self.workers, cfg.prefetch, device)
        row = shapes[0] if len(shapes) == 1 else (sum(int(np.prod(shape)) for shape in shapes),)
        batches = create_batches(self._make, (self._share, *row), self.workers, cfg.prefetch, source.path)
        return _FromRows(batches, shapes, mean, std)

    def state(self) -> dict[str, Any]:
        """Where the stream stands: JSON; batches that were made ahead but not given count as not made."""
        return {"step": self.step, "images": len(self.source), "pipeline": self.choice.name} | self._budget.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where `state()` was taken, in this or another process.

        Raises:
            DataError: the pipeline that the run was begun with cannot be had here, and `cfg` asks for no other.
        """
        self.close()
        if "pipeline" in state:
            self.choice = choose_again(state["pipeline"], self.source, self._cfg, self.choice, self._training)
        if state.get("images", len(self.source)) != len(self.source):
            _log.warning(
                "%s has %d images, but had %d when the run was saved: it goes on with other images than it would have",
                self.source.name,
                len(self.source),
                state["images"],
            )
        self.step = int(state["step"])
        self._budget.load_state(state)

    def advice(self) -> str:
        """What would make batches faster, with these settings on this machine."""
        found = []
        if self.workers < (most := cpus()):
            found.append(f"with --data.workers {most}")
        if self._training == "gpu" and self.choice.name != "dali gpu" and jpeg_share(self.source) > 0.5:
            from fastmim.data.dali_trial import INSTALL, why_not

            install = "" if not why_not() else f"{INSTALL} and "
            found.append(f"by DALI on the GPU ({install}--data.pipeline dali)")
        if self._training == "gpu" and self._cfg.output == "float32" and self.choice.name != "dali gpu":
            found.append("as bytes that the GPU normalises (--data.output uint8)")
        found.append("from smaller files, such as images stored with a shorter side of 256 pixels")
        return f"they can be read faster {', or '.join(found)}"

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


class _FromRows:
    """Rows of bytes as tensors, one for each view; normalised where `mean` and `std` are given."""

    def __init__(
        self,
        batches: Batches,
        shapes: Sequence[tuple[int, ...]],
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        self.rows, self.ahead = batches, batches.ahead
        self.ask, self.close = batches.ask, batches.close
        self._shapes, self._mean, self._std = shapes, mean, std

    def take(self) -> tuple[list[Tensor], list[Made]]:
        rows, made = self.rows.take()
        sizes = [int(np.prod(shape)) for shape in self._shapes]
        parts = torch.from_numpy(rows).flatten(1).split(sizes, dim=1)
        views = [part.reshape(-1, *shape) for part, shape in zip(parts, self._shapes, strict=True)]
        # A copy in either case: the slot is filled again by the next `ask`.
        if self._mean is not None and self._std is not None:
            return [normalise(view, self._mean, self._std) for view in views], made
        return [view.clone(memory_format=torch.contiguous_format) for view in views], made


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
    device: torch.device | None = None,
    choice: Choice | None = None,
) -> Loader:
    """The training loader that `cfg` asks for, with a line in the log where it chooses; arguments as `TrainLoader` has
    them."""
    loader = TrainLoader(source, cfg, img_size, batch_size, seed, rank, world_size, start_step, views, device, choice)
    if loader.choice.reason:
        how = "DALI on the GPU" if loader.choice.pipeline == "dali" else "Pillow"
        _log.info("Images are read by %s (data.pipeline: auto): %s.", how, loader.choice.reason)
    return loader


def workers_for(source: Source, cfg: DataConfig) -> int:
    """How many worker processes `cfg.workers` means on this machine, for each training process on it."""
    if cfg.workers != "auto":
        return cfg.workers
    if source.in_memory:
        return 0
    return cpus()


def cpus() -> int:
    """How many this process may count on, where others like it train on the same machine."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, count // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
