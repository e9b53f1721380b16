"""Reconstruction pictures: one row an image, original | masked | reconstruction."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmim.methods import Pictures

logger = logging.getLogger(__name__)

_ROWS = 8
_SMALLEST_SIDE = 96  # smaller images are enlarged by a whole factor
_GAP = 4  # pixels between images


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised images [B, C, H, W] as uint8 [B, H, W, 3]: the first three channels, or the first one in grey."""
    channels = images.shape[1]

    def per_channel(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).expand(channels).view(-1, 1, 1)

    pixels = images.detach().float().cpu() * per_channel(std) + per_channel(mean)
    pixels = pixels[:, :3] if channels >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    pixels = (pixels.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def picture_grid(pictures: Pictures, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 [height, width, 3]: up to eight rows of original, masked, reconstruction."""
    columns = [
        to_pixels(images[:_ROWS], mean, std) for images in (pictures.original, pictures.masked, pictures.reconstruction)
    ]
    height, width = columns[0].shape[1:3]
    factor = max(1, -(-_SMALLEST_SIDE // min(height, width)))
    height, width = height * factor, width * factor
    rows = len(columns[0])
    grid = np.full((rows * (height + _GAP) - _GAP, 3 * (width + _GAP) - _GAP, 3), 255, np.uint8)
    for c, column in enumerate(columns):
        for r, pixels in enumerate(column.repeat(factor, axis=1).repeat(factor, axis=2)):
            top, left = r * (height + _GAP), c * (width + _GAP)
            grid[top : top + height, left : left + width] = pixels
    return grid


def draw(path: Path, pictures: Callable[[], Pictures], mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Compute the pictures of a step and write them to `path`; a disk that refuses is a warning. Returns the grid."""
    with torch.no_grad():
        grid = picture_grid(pictures(), mean, std)
    try:
        save_picture(path, grid)
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, error.strerror)
    return grid


def save_picture(path: Path, grid: np.ndarray) -> None:
    """Write a PNG; a kill leaves it whole or not there."""
    from PIL import Image

    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(grid).save(temporary, format="PNG")
    os.replace(temporary, path)
