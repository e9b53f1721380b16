"""Scikit-learn's 1,797 handwritten digits, 8 x 8, labelled: real images that need no download."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from fastmim.data.config import DataConfig
from fastmim.data.errors import DataError
from fastmim.data.sources import Source


class DigitsSource(Source):
    """The digits as grey 8-bit images; values 0..16 become 0..255. The pipeline enlarges them.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    """

    name = "digits"
    natural_chans = 1
    natural_mean = (0.3053,)
    natural_std = (0.3760,)
    natural_scale = (0.6, 1.0)
    natural_flip = False  # a mirrored 2 is no digit
    eval_share = 1.0
    in_memory = True

    def __init__(self, cfg: DataConfig) -> None:
        super().__init__(cfg)
        values = _table()
        self.images = np.rint(values[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self.labels = values[:, -1].astype(np.int64)
        self.classes = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> str:
        return f"digit {index} of scikit-learn"

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])


def _table() -> np.ndarray:
    """A row for each digit: 64 pixels, then which digit it is. Read from scikit-learn's own file, because importing
    scikit-learn takes longer than all else of a small run's start."""
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise DataError(
            "The digits come with scikit-learn, which is not installed: pip install scikit-learn, "
            "or train on your own images with --data.root DIR."
        )
    file = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    if file.is_file():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits  # another version may keep it elsewhere

    digits = load_digits()
    return np.column_stack([digits.data, digits.target])
