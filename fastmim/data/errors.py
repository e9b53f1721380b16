"""What can go wrong with the data. Each error carries the exit code that the commands end with."""

import os


class DataError(ValueError):
    """The data asked for cannot be used at all: missing, empty or image-less folder, impossible setting."""

    code = 2


class BadDataError(RuntimeError):
    """More images were unreadable than the budget allows."""

    code = 3


class WorkerError(RuntimeError):
    """A data worker process died or raised something that is not the fault of an image."""

    code = 1


def printable(path: str) -> str:
    """`path` as text that any log file or terminal takes: bytes that are not UTF-8 appear as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
