"""Any folder of images: flat, or one folder per class.

Found recursively by extension, in the byte order of their paths, whatever the locale or the file system. Links to
folders are followed, each folder is entered once, so a loop ends. Names may be any bytes. Names that begin with a dot
(and the "._photo.jpg" that some systems leave beside each photo) are passed over.

Names listed in `.fastmim-exclude.txt` at the top of the folder, or in the file that `data.exclude` names, are left out:
one a line, relative to the folder. `python -m fastmim.data.verify` writes such a list.

Labels: when the folder holds images itself, or everything lies in a single sub-folder, there are none. Otherwise the
first-level folders that hold images are the classes, in byte order.
"""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

from fastmim.data.config import DataConfig
from fastmim.data.decode import open_image
from fastmim.data.errors import DataError, printable
from fastmim.data.exclusion import excluded
from fastmim.data.listing import EXTENSIONS, IMAGES, files_under
from fastmim.data.sources import Source

_BYTES_PER_PIXEL = 8  # four channels of 16 bits, uncompressed: no honest file is larger


class FolderSource(Source):
    """The images under `cfg.root`; `classes` prescribes the labels instead of deriving them.

    `excluding` False reads the names on the list of excluded ones too. `base` is the folder that names are relative to.
    """

    def __init__(self, cfg: DataConfig, classes: list[str] | None = None, excluding: bool = True) -> None:
        super().__init__(cfg)
        root = _checked(cfg.root)
        self.name = f"folder {printable(str(root))}"
        self.max_pixels = cfg.max_pixels
        self.base = root
        self._root = os.fsencode(root)
        names = list(files_under(self._root, lambda name: bool(IMAGES.search(name))))
        if not names:
            raise DataError(
                f"data.root: no images under {printable(str(root))} "
                f"(looked for {', '.join(ext.decode() for ext in EXTENSIONS)} in it and all its folders)."
            )
        exclusion = excluded(root, cfg.exclude) if excluding else None
        if exclusion is not None and exclusion.names is not None:
            left = [name for name in names if name not in exclusion.names]
            self.notes += exclusion.notes(len(names), len(left))
            names = left
        # One block of bytes instead of a string each: a million names cost little, and forked workers share them.
        self._names = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self._label(names, classes)

    def _label(self, names: list[bytes], classes: list[str] | None) -> None:
        folders = [name.split(b"/", 1)[0] if b"/" in name else None for name in names]
        found = sorted({folder for folder in folders if folder is not None})
        if None in folders or (len(found) < 2 and classes is None):
            return
        found_classes = [printable(os.fsdecode(folder)) for folder in found]
        self.classes = found_classes if classes is None else classes
        number = {name: label for label, name in enumerate(self.classes)}
        strangers = [name for name in found_classes if name not in number]
        if strangers:
            raise DataError(
                f"data.root: {self.name} has classes that the training images do not have: {', '.join(strangers[:5])}."
            )
        of_folder = {folder: number[name] for folder, name in zip(found, found_classes, strict=True)}
        self.labels = np.array([of_folder[folder] for folder in folders if folder is not None], dtype=np.int64)

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


def _checked(root: Path | None) -> Path:
    if root is None:
        raise DataError("data.root is not given: say --data.root DIR.")
    root = Path(root).expanduser()
    if not root.exists():
        raise DataError(f"data.root: {printable(str(root))} does not exist.")
    if not root.is_dir():
        raise DataError(f"data.root: {printable(str(root))} is a file, not a folder of images.")
    return root.absolute()
