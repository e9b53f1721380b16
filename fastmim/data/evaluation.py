"""Batches for evaluation: every image once, in order, nothing random; and a held-out part where a folder has none."""

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmim.data.budget import Budget
from fastmim.data.config import DataConfig
from fastmim.data.draws import Purpose, permutation
from fastmim.data.loader import workers_for
from fastmim.data.pipeline import EvalRow
from fastmim.data.pixels import normalise
from fastmim.data.sources import Source
from fastmim.data.workers import Task, create_batches


def eval_batches(
    source: Source,
    cfg: DataConfig,
    img_size: tuple[int, int],
    batch_size: int,
    indices: Sequence[int] | NDArray[np.int64] | None = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images resized (shorter side to size * 256 / 224; digits: to size) and cropped at the centre, in order.

    An unreadable image is left out, logged, and counted against the budget.

    Args:
        img_size: (height, width).
        indices: which images, in which order; all when None.

    Yields:
        images [B, C, H, W], float32 normalised or uint8 as `cfg.output` says, the last batch possibly smaller; labels
        [B] int64, or None where images have no labels.

    Raises:
        BadDataError, WorkerError: as the training loader.
    """
    cfg.check()
    source.report()
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    chunks: list[list[Task]] = [
        [(0, index) for index in chosen[start : start + batch_size].tolist()]
        for start in range(0, len(chosen), batch_size)
    ]
    budget = Budget(source, cfg)
    shape = (min(batch_size, max(1, len(chosen))), source.in_chans, *img_size)
    workers = min(workers_for(source, cfg), len(chunks) * shape[0] // 64)  # a few images are not worth a process
    batches = create_batches(EvalRow(source, cfg, img_size), shape, workers, cfg.prefetch, source.path)
    try:
        asked = iter(chunks)
        for done in count():
            ahead = batches.ahead if done == 0 else 1
            for _, tasks in zip(range(ahead), asked, strict=False):
                batches.ask(tasks)
            if done == len(chunks):
                return
            pixels, made = batches.take()
            for row in made:
                budget.record(row)
            readable = np.array([row.image for row in made])
            readable = readable[readable >= 0]
            if not len(readable):
                continue
            images = torch.from_numpy(pixels)[torch.tensor([row.image >= 0 for row in made])]
            if cfg.output == "float32":
                images = normalise(images, source.mean, source.std)
            yield images, None if source.labels is None else torch.from_numpy(source.labels[readable])
    finally:
        batches.close()


def split(source: Source, seed: int, fraction: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Image numbers of a training and a held-out part, disjoint, both sorted; `fraction` of each class is held out.

    A class of two images or more has at least one in either part. Without labels all images are one class.

    Raises:
        ValueError: a fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"split: fraction must lie between 0 and 1; got {fraction}.")
    labels = np.zeros(len(source), dtype=np.int64) if source.labels is None else source.labels
    held_out = np.zeros(len(source), dtype=bool)
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        order = permutation(seed, label, len(members), Purpose.SPLIT)
        share = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out[members[order[:share]]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
