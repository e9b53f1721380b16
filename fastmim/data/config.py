"""What a user can say about the data."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastmim.data.errors import DataError


@dataclass
class DataConfig:
    """Which images, how they are cropped, and how they are read."""

    source: Literal["digits", "folder", "list", "webdataset", "tfrecord"] | None = None
    """Where images come from: `folder` (any folder of images), `list` (a text file that names them), `webdataset` (tar
    shards), `tfrecord` (TFRecord files) or `digits` (scikit-learn's 1,797 handwritten digits). Default: what `root`
    holds, digits without one."""

    root: Path | None = None
    """Folder of images, searched recursively: flat, or one folder per class. Or a .txt or .lst file with a path on
    each line, and after it a label if you like. Or shards: a folder of .tar or TFRecord files, one such file, or a
    pattern like shards-{000000..000012}.tar. With a `train` folder beside `val`, `valid`, `validation` or `test`,
    training reads `train` and evaluation the other."""

    exclude: Path | None = None
    """File that names images to leave out, one a line, relative to the folder that is read (in shards: shard/key).
    Default: .fastmim-exclude.txt in that folder, where there is one (`python -m fastmim.data.verify` writes it)."""

    pipeline: Literal["auto", "dali", "pillow"] = "auto"
    """What decodes, crops and resizes training images: Pillow in worker processes, or DALI (`pip install
    "fastmim[dali]"`), which takes `workers` as its number of threads and leaves what is no JPEG to Pillow. auto: DALI
    where it is installed, training is on a GPU and nine images in ten are JPEGs, otherwise Pillow; the log says why.
    A run that is resumed stays with what it was begun with, because the two differ by resampling."""

    dali_device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where DALI decodes and resizes; its batches are made there. auto: where training is."""

    workers: int | Literal["auto"] = "auto"
    """Processes that read images; 0 reads them in the training process. auto: 0 for digits, otherwise one per CPU.
    Batches are the same whatever the number."""

    prefetch: int = 4
    """Batches made ahead of the one in use, with workers or DALI."""

    scale: tuple[float, float] | None = None
    """Smallest and largest share of the image area that a random crop covers. Default: 0.2 1 for folders, 0.6 1 for
    digits."""

    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio (width / height) of a random crop."""

    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How crops are resized, always with antialiasing."""

    flip: bool | None = None
    """Mirror half of the images. Default: true for folders, false for digits."""

    mean: tuple[float, ...] | None = None
    """Mean of each channel, in [0, 1]. Default: ImageNet's for folders, the digits' own for digits."""

    std: tuple[float, ...] | None = None
    """Standard deviation of each channel. Default: as for `mean`."""

    in_chans: int | None = None
    """Channels: 3 (colour) or 1 (grey). Default: 3 for folders, 1 for digits."""

    output: Literal["float32", "uint8"] = "float32"
    """What the loader hands over: normalised float32, or uint8 that the trainer normalises on the device (a quarter of
    the bytes to copy to a GPU)."""

    max_pixels: int = 100_000_000
    """Images with more pixels than this are refused before they are decoded (decompression bombs)."""

    bad_budget: int | None = None
    """Unreadable files (each replaced by another image) that a run tolerates before it stops with exit code 3.
    Default: 20 or 1 % of the images, whichever is more."""

    def __post_init__(self) -> None:
        self.root, self.exclude = (None if path is None else Path(path) for path in (self.root, self.exclude))

    def check(self) -> None:
        """Raise DataError, naming the key, for values that no source can use."""
        for key, pair in (("scale", self.scale), ("ratio", self.ratio)):
            if pair is not None and not (0 < pair[0] <= pair[1] and math.isfinite(pair[1])):
                raise DataError(f"data.{key} must be two positive numbers, smallest first; got {list(pair)}.")
        if self.scale is not None and self.scale[1] > 1:
            raise DataError(f"data.scale is a share of the image area, at most 1; got {list(self.scale)}.")
        if self.in_chans not in (None, 1, 3):
            raise DataError(f"data.in_chans must be 1 (grey) or 3 (colour); got {self.in_chans}.")
        if self.workers != "auto" and self.workers < 0:
            raise DataError(f"data.workers must be auto, 0 or more; got {self.workers}.")
        for key, number, least in (("prefetch", self.prefetch, 1), ("max_pixels", self.max_pixels, 1)):
            if number < least:
                raise DataError(f"data.{key} must be at least {least}; got {number}.")
        if self.bad_budget is not None and self.bad_budget < 0:
            raise DataError(f"data.bad_budget must be 0 or more; got {self.bad_budget}.")
        if self.std is not None and min(self.std) <= 0:
            raise DataError(f"data.std must be positive; got {list(self.std)}.")
        if self.pipeline == "pillow" and self.dali_device != "auto":
            raise DataError(
                f"data.dali_device is {self.dali_device}, but data.pipeline is pillow: drop one of the two."
            )
        if self.source not in (None, "digits") and self.root is None:
            raise DataError(f"data.source is {self.source}, but data.root is not given: say --data.root DIR.")
        if self.source == "digits" and self.root is not None:
            raise DataError(
                f"data.source is digits, which reads no folder, but data.root is {self.root}: drop one of the two."
            )
