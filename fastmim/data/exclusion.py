"""The list of images to leave out: one name a line, as `python -m fastmim.data.verify` writes it."""

import logging
from dataclasses import dataclass
from pathlib import Path

from fastmim.data.errors import DataError, printable

EXCLUDE = ".fastmim-exclude.txt"

_log = logging.getLogger("fastmim.data")


@dataclass
class Exclusion:
    """`names` are relative to the folder that is read; None where there is no list."""

    path: Path
    names: set[bytes] | None

    def report(self, before: int, left: int) -> None:
        """Say how many of `before` images are left.

        Raises:
            DataError: none is.
        """
        if self.names is None:
            return
        if before and not left:
            raise DataError(f"data.root: {printable(str(self.path))} excludes all {before} images.")
        _log.info("%d of %d images are left out, as %s says", before - left, before, printable(str(self.path)))


def excluded(root: Path, exclude: Path | None) -> Exclusion:
    """The list at `exclude`, or that of the folder `root`, which may be absent.

    Raises:
        DataError: a list that was asked for cannot be read.
    """
    path = root / EXCLUDE if exclude is None else Path(exclude).expanduser()
    if exclude is None and not path.is_file():
        return Exclusion(path, None)
    try:
        return Exclusion(path, set(path.read_bytes().split(b"\n")) - {b""})
    except OSError as error:
        raise DataError(f"data.exclude: {printable(str(path))} cannot be read: {error.strerror}.") from error
