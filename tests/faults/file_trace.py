"""The training command with a list of what it asks of the file system: python -m tests.faults.file_trace --out ... .

Appends a line to the file that FILE_TRACE names for each fsync, rename and replace, with paths.
"""

import os
import sys
from typing import Any

from fastmim.command_line import command


def traced(name: str) -> None:
    call = getattr(os, name)

    def and_written_down(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        paths = [os.readlink(f"/proc/self/fd/{arg}") if isinstance(arg, int) else os.fspath(arg) for arg in args]
        with open(os.environ["FILE_TRACE"], "a") as file:
            print(name, *paths, sep="\t", file=file)
        return result

    setattr(os, name, and_written_down)


if __name__ == "__main__":
    for name in ("fsync", "rename", "replace"):
        traced(name)
    from fastmim.train import main

    command(main, sys.argv[1:])
