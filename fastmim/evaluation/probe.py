"""From an encoder and labelled images to accuracies with their spread."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastmim.data import DataConfig, Source, create_source, eval_batches, held_out_source, split
from fastmim.engine.precision import choose_precision
from fastmim.evaluation.features import Pool, extract_features
from fastmim.evaluation.knn import knn_accuracy
from fastmim.evaluation.linear import linear_accuracy
from fastmim.models import Encoder

HELD_OUT_SHARE = 0.2
_MEASURES: dict[str, Callable[..., float]] = {"knn": knn_accuracy, "linear": linear_accuracy}


@dataclass
class Score:
    """Top-1 accuracy of frozen features."""

    kind: str
    top1: list[float]  # percent, one a split
    seeds: list[int]  # of the splits; empty where the data has a held-out part of its own
    train_images: int
    test_images: int
    classes: int

    @property
    def mean(self) -> float:
        return fmean(self.top1)

    @property
    def spread(self) -> float:
        """Standard deviation over the splits; 0 for a single one."""
        return stdev(self.top1) if len(self.top1) > 1 else 0.0

    def __str__(self) -> str:
        how = "on the held-out folder"
        if len(self.seeds) > 1:
            how = f"± {self.spread:.1f} over {len(self.seeds)} split seeds"
        elif self.seeds:
            how = f"split seed {self.seeds[0]}"
        return f"{self.kind} top-1 {self.mean:.1f} % ({how})"

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "top1": round(self.mean, 4),
            "spread": round(self.spread, 4),
            "top1_per_seed": [round(value, 4) for value in self.top1],
            "seeds": self.seeds,
            "train_images": self.train_images,
            "test_images": self.test_images,
            "classes": self.classes,
        }


def probe(
    encoder: Encoder,
    data: DataConfig,
    img_size: tuple[int, int],
    kinds: Sequence[str] = ("knn", "linear"),
    *,
    seeds: Sequence[int] = (0, 1, 2),
    device: torch.device | str | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    batch_size: int = 128,
    pool: Pool = "avg",
    options: dict[str, Any] | None = None,
) -> dict[str, Score]:
    """Accuracy of the encoder's frozen features; each image passes through the encoder once.

    Where the data has a held-out folder (`val` beside `train`), training images are those of `train` and the seeds are
    not used. Elsewhere each seed holds out another fifth of every class.

    Args:
        encoder: on `device`.
        data: which images; what concerns random crops is ignored.
        img_size: (height, width) given to the encoder.
        kinds: "knn", "linear" or both.
        device, pool: see `extract_features`.
        precision: of the encoder; "auto" takes bf16 where the device is fast at it.
        options: further arguments of `knn_accuracy` (k, temperature) or `linear_accuracy` (l2), when `kinds` is one.

    Raises:
        ValueError: images without labels, in fewer than two classes, or none left to test.
    """
    device = torch.device(device) if device is not None else next(encoder.parameters()).device
    precision = "bf16" if choose_precision(precision, device)[0] == "bf16" else "fp32"
    data = replace(data, output="float32")
    source, held_out = create_source(data), held_out_source(data)
    for part in (source, held_out):
        if part is not None and part.labels is None:
            raise ValueError(f"data.root: {part.name} {part.unlabelled}")

    def features(part: Source) -> tuple[Tensor, Tensor]:
        x, y = extract_features(
            encoder, eval_batches(part, data, img_size, batch_size), device, pool=pool, precision=precision
        )
        assert y is not None
        return x, y

    x, y = features(source)
    if held_out is not None:
        splits = [(x, y, *features(held_out))]
    else:
        splits = []
        for seed in seeds:
            train, test = (torch.from_numpy(part) for part in split(_Labelled(y), seed, HELD_OUT_SHARE))
            splits.append((x[train], y[train], x[test], y[test]))
    train_y, test_y = splits[0][1], splits[0][3]
    if not len(test_y):
        raise ValueError(f"data.root: every class of {source.name} has a single image; none is left to test with")
    return {
        kind: Score(
            kind,
            [_MEASURES[kind](*(part.to(device) for part in parts), **(options or {})) for parts in splits],
            [] if held_out is not None else list(seeds),
            len(train_y),
            len(test_y),
            len(source.classes or ()),
        )
        for kind in kinds
    }


class _Labelled(Source):
    """The images that could be read, for `split`."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels.numpy().astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels) if self.labels is not None else 0
