"""What a command does when nobody reads its output any more, as in `python -m fastmim.info | head -1`."""

import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fastmim.engine.logs import hush

__all__ = ["PIPE_CLOSED", "while_output_is_read"]

PIPE_CLOSED = 128 + 13  # what a shell says of a program that SIGPIPE ended


@contextmanager
def while_output_is_read() -> Iterator[None]:
    """Ends the program without a word, with exit code 141, once what it prints to is closed.

    Raises:
        SystemExit: with 141. A broken pipe that is not its output passes through.
    """
    try:
        try:
            yield
        except SystemExit:  # after --help, say
            _flush()
            raise
        _flush()
    except BrokenPipeError:
        if not _closed():
            raise
        hush()
        raise SystemExit(PIPE_CLOSED) from None


def _flush() -> None:
    """Here, where a closed pipe can be answered; at its exit Python would print a traceback."""
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def _closed() -> bool:
    """Whether the reader of stdout or of stderr is gone."""
    for stream in (sys.stdout, sys.stderr):
        try:
            waiting = select.poll()
            waiting.register(stream.fileno(), 0)
            if any(event & select.POLLERR for _, event in waiting.poll(0)):
                return True
        except (AttributeError, OSError, ValueError):  # no stream, no descriptor, or no poll on this system
            continue
    return False
