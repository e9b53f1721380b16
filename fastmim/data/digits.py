"""Scikit-learn's 1,797 handwritten digits, 8 x 8, labelled: real images that need no download."""

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
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(
                "The digits come with scikit-learn, which is not installed: pip install scikit-learn, "
                "or train on your own images with --data.root DIR."
            ) from error
        digits = load_digits()
        self.images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        self.labels = digits.target.astype(np.int64)
        self.classes = [str(name) for name in digits.target_names]

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> str:
        return f"digit {index} of scikit-learn"

    def open(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])
