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
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fastmim.data.config import DataConfig
from fastmim.data.decode import open_image
from fastmim.data.errors import DataError, printable
from fastmim.data.sources import Source

EXTENSIONS = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".tif", b".tiff")
EXCLUDE = ".fastmim-exclude.txt"
HELD_OUT = ("val", "valid", "validation", "test")

_log = logging.getLogger("fastmim.data")
_HINT_SECONDS = 10.0
_BYTES_PER_PIXEL = 8  # four channels of 16 bits, uncompressed: no honest file is larger


class FolderSource(Source):
    """The images under `cfg.root`; `classes` prescribes the labels instead of deriving them.

    `excluding` False reads the names on the list of excluded ones too.
    """

    def __init__(self, cfg: DataConfig, classes: list[str] | None = None, excluding: bool = True) -> None:
        super().__init__(cfg)
        root = _checked(cfg.root)
        self.name = f"folder {printable(str(root))}"
        self.max_pixels = cfg.max_pixels
        self._root = os.fsencode(root)
        names = list(_images_under(self._root))
        if not names:
            raise DataError(
                f"data.root: no images under {printable(str(root))} "
                f"(looked for {', '.join(ext.decode() for ext in EXTENSIONS)} in it and all its folders)."
            )
        if excluding:
            names = _without(names, root, cfg.exclude)
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


def find_splits(root: Path) -> tuple[Path, Path] | None:
    """The training and the held-out folder in `root`, where both exist under their usual names."""
    root = Path(root).expanduser()
    train = root / "train"
    if not train.is_dir():
        return None
    return next(((train, root / name) for name in HELD_OUT if (root / name).is_dir()), None)


def _checked(root: Path | None) -> Path:
    if root is None:
        raise DataError("data.root is not given: say --data.root DIR.")
    root = Path(root).expanduser()
    if not root.exists():
        raise DataError(f"data.root: {printable(str(root))} does not exist.")
    if not root.is_dir():
        raise DataError(f"data.root: {printable(str(root))} is a file, not a folder of images.")
    return root.absolute()


def _without(names: list[bytes], root: Path, exclude: Path | None) -> list[bytes]:
    """`names` less those on the list of excluded ones, which may be absent unless it was asked for."""
    path = root / EXCLUDE if exclude is None else Path(exclude).expanduser()
    if exclude is None and not path.is_file():
        return names
    try:
        listed = set(path.read_bytes().split(b"\n")) - {b""}
    except OSError as error:
        raise DataError(f"data.exclude: {printable(str(path))} cannot be read: {error.strerror}.") from error
    left = [name for name in names if name not in listed]
    if not left:
        raise DataError(f"data.root: {printable(str(path))} excludes all {len(names)} images.")
    _log.info("%d of %d images are left out, as %s says", len(names) - len(left), len(names), printable(str(path)))
    return left


def _images_under(root: bytes) -> Iterator[bytes]:
    """Paths of images relative to `root`, in byte order of (folder by folder, name by name)."""
    entered: set[tuple[int, int]] = set()
    count = 0
    said = time.monotonic()
    waiting = [b""]
    while waiting:
        folder = waiting.pop()
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                found = sorted((entry for entry in entries if not entry.name.startswith(b".")), key=_name)
        except OSError as error:
            if not folder:
                raise DataError(
                    f"data.root: {printable(os.fsdecode(root))} cannot be listed: {error.strerror}."
                ) from error
            _log.warning("folder passed over: %s (%s)", printable(os.fsdecode(path)), error.strerror)
            continue
        folders = [entry.name for entry in found if _answers(entry.is_dir)]
        for entry in found:
            if entry.name.lower().endswith(EXTENSIONS) and _answers(entry.is_file):
                count += 1
                yield os.path.join(folder, entry.name)
        if time.monotonic() - said > _HINT_SECONDS:
            said = time.monotonic()
            _log.info("listing %s: %s images so far", printable(os.fsdecode(root)), f"{count:,}")
        waiting.extend(os.path.join(folder, name) for name in reversed(folders))


def _answers(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # a link to itself
        return False


def _name(entry: os.DirEntry[bytes]) -> bytes:
    return entry.name
