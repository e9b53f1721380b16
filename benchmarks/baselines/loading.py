"""The plain way to load images: torch's DataLoader around Pillow, with the usual transforms written out.

Random resized crop, bicubic with antialias, mirror, tensor, normalise; several views from one decode.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from fastmim.data import ViewSpec

_MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
_STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)


class PlainImages(Dataset):
    """The images of a folder, each as its views."""

    def __init__(self, folder: Path, views: Sequence[ViewSpec], output: str) -> None:
        self.paths = sorted(folder.rglob("*.jpg"))
        self.views, self.output = views, output

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> list[Tensor]:
        with open(self.paths[index], "rb") as file:
            image = Image.open(file).convert("RGB")
        return [self._view(image, view) for view in self.views]

    def _view(self, image: Image.Image, view: ViewSpec) -> Tensor:
        crop = image.crop(_random_box(image.size, view.scale or (0.2, 1.0)))
        crop = crop.resize((view.size[1], view.size[0]), Image.Resampling.BICUBIC)
        if torch.rand(1).item() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()
        if self.output == "uint8":
            return pixels
        return pixels.to(torch.float32).div(255).sub(_MEAN).div(_STD)


def plain_loader(folder: Path, views: Sequence[ViewSpec], output: str, batch_size: int, workers: int) -> Any:
    """A DataLoader whose pass over the folder does not end soon."""
    images = PlainImages(folder, views, output)
    sampler: Any = RandomSampler(images, replacement=True, num_samples=10**7)
    return DataLoader(images, batch_size, sampler=sampler, num_workers=workers, drop_last=True)


def _random_box(size: tuple[int, int], scale: tuple[float, float]) -> tuple[int, int, int, int]:
    width, height = size
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(*scale).item()
        ratio = math.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3)).item())
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(0, width - w + 1, (1,)))
            top = int(torch.randint(0, height - h + 1, (1,)))
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
