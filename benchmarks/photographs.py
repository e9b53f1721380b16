"""A folder of JPEGs of the usual size, made from scikit-learn's two photographs, so that nothing is downloaded."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (500, 375)  # width, height: ImageNet's usual
_QUALITY = 90


def write_photographs(folder: Path, count: int, seed: int = 0) -> None:
    """`count` JPEGs, each another part of one of the photographs (427 x 640 pixels)."""
    from sklearn.datasets import load_sample_image

    photographs = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    rng = np.random.default_rng(seed)
    width, height = SIZE
    for number in range(count):
        pixels = photographs[number % len(photographs)]
        top = int(rng.integers(pixels.shape[0] - height + 1))
        left = int(rng.integers(pixels.shape[1] - width + 1))
        part = Image.fromarray(pixels[top : top + height, left : left + width])
        part.save(folder / f"{number:05d}.jpg", quality=_QUALITY)
