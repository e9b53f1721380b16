"""From what a loader gives to what a step takes: on the device, normalised."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fastmim.data import RawBatch, normalise

__all__ = ["Inputs", "ToDevice"]


class Inputs(NamedTuple):
    images: Tensor
    labels: Tensor | None
    indices: Tensor | None
    views: dict[str, Tensor]


class ToDevice:
    """Moves batches without waiting for the device: to a GPU by way of pinned memory, from which it copies by itself.
    uint8 images are normalised there, others have been.

    Args:
        mean, std: per channel.
    """

    def __init__(self, device: torch.device, mean: Sequence[float], std: Sequence[float]) -> None:
        self.device, self._pin = device, device.type == "cuda"
        self._mean, self._std = (torch.tensor(values, dtype=torch.float32, device=device) for values in (mean, std))

    def __call__(self, raw: RawBatch) -> Inputs:
        views = {name: self._normalised(view) for name, view in raw.views.items()}
        return Inputs(self._normalised(raw.images), self._moved(raw.labels), self._moved(raw.indices), views)

    def _moved(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if self._pin and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _normalised(self, images: Tensor) -> Tensor:
        images = cast(Tensor, self._moved(images))
        return normalise(images, self._mean, self._std) if images.dtype == torch.uint8 else images
