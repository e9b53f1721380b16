"""Files under a folder, in an order that depends on nothing but their names."""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fastmim.data.errors import DataError, printable

EXTENSIONS = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".tif", b".tiff")
IMAGES = re.compile(rb"(" + b"|".join(re.escape(ext) for ext in EXTENSIONS) + rb")\Z", re.IGNORECASE)
HELD_OUT = ("val", "valid", "validation", "test")

_log = logging.getLogger("fastmim.data")
_HINT_SECONDS = 10.0


def find_splits(root: Path) -> tuple[Path, Path] | None:
    """The training and the held-out folder in `root`, where both exist under their usual names."""
    root = Path(root).expanduser()
    train = root / "train"
    if not train.is_dir():
        return None
    return next(((train, root / name) for name in HELD_OUT if (root / name).is_dir()), None)


def files_under(root: bytes, wanted: Callable[[bytes], bool]) -> Iterator[bytes]:
    """Paths relative to `root` of files whose name is `wanted`, in byte order of (folder by folder, name by name).

    Links to folders are followed, each folder is entered once. Names that begin with a dot are passed over.

    Raises:
        DataError: `root` cannot be listed.
    """
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
            if wanted(entry.name) and _answers(entry.is_file):
                count += 1
                yield os.path.join(folder, entry.name)
        if time.monotonic() - said > _HINT_SECONDS:
            said = time.monotonic()
            _log.info("listing %s: %s files so far", printable(os.fsdecode(root)), f"{count:,}")
        waiting.extend(os.path.join(folder, name) for name in reversed(folders))


def _answers(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # a link to itself
        return False


def _name(entry: os.DirEntry[bytes]) -> bytes:
    return entry.name
