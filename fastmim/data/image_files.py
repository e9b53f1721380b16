"""Images that are files of their own: names in one block of bytes, opened when they are asked for."""

import io
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastmim.data.config import DataConfig
from fastmim.data.decode import open_image
from fastmim.data.exclusion import excluded
from fastmim.data.sources import Source

_BYTES_PER_PIXEL = 8  # four channels of 16 bits, uncompressed: no honest file is larger


class ImageFiles(Source):
    """Image files by name.

    Args:
        cfg: for the limits and the list of excluded names.
        base: folder that names are relative to; absolute.
        names: paths, as bytes, because file systems have names that no encoding fits.
        excluding: leave out what the list of excluded names says; `kept` says which of `names` are left.
    """

    def __init__(self, cfg: DataConfig, base: Path, names: list[bytes], excluding: bool) -> None:
        super().__init__(cfg)
        self.max_pixels = cfg.max_pixels
        self.base = base
        self._root = os.fsencode(base)
        self.kept: NDArray[np.int64] = np.arange(len(names))
        exclusion = excluded(base, cfg.exclude) if excluding else None
        if exclusion is not None and exclusion.names is not None:
            self.kept = np.array([i for i, name in enumerate(names) if name not in exclusion.names], dtype=np.int64)
            self.notes += exclusion.notes(len(names), len(self.kept))
            names = [names[i] for i in self.kept]
        # One block of bytes instead of a string each: a million names cost little, and forked workers share them.
        self._names = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def path(self, index: int) -> str:
        return os.fsdecode(os.path.join(self._root, self.name_of(index)))

    def name_of(self, index: int) -> bytes:
        """The path of image `index` relative to the folder."""
        start = self._ends[index - 1] if index else 0
        return self._names[start : self._ends[index]]

    def open(self, index: int) -> Image.Image:
        most = _BYTES_PER_PIXEL * self.max_pixels
        with open(self.path(index), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise ValueError(f"{size:,} bytes, more than {_BYTES_PER_PIXEL} for each of data.max_pixels")
            return open_image(io.BytesIO(file.read()), self.max_pixels)
