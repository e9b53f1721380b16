"""The list of images to leave out: one name a line, as `python -m fastmim.data.verify` writes it."""

import logging
from dataclasses import dataclass
from pathlib import Path

from fastmim.data.errors import DataError, printable

EXCLUDE = ".fastmim-exclude.txt"


@dataclass
class Exclusion:
    """`names` are relative to the folder that is read; None where there is no list."""

    path: Path
    names: set[bytes] | None

    def notes(self, before: int, left: int) -> tuple[tuple[int, str], ...]:
        """What is to be said where `left` of `before` images remain: (level of logging, words).

        Raises:
            DataError: none remains.
        """
        if before and not left:
            raise DataError(f"data.root: {printable(str(self.path))} excludes all {before} images.")
        return (
            (logging.INFO, f"{before - left} of {before} images are left out, as {printable(str(self.path))} says"),
        )


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
