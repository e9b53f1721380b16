"""Where log lines go: everything to train.log, plain sentences to the terminal."""

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

_ROOT = logging.getLogger("fastmim")


class _LogFile(logging.FileHandler):
    """A disk that refuses costs one warning, not the run."""

    broken = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.broken:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        self.broken = True
        _ROOT.warning("train.log cannot be written (%s); the run goes on without it.", sys.exc_info()[1])

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class _Terminal(logging.Handler):
    """INFO to stdout, warnings and errors to stderr, as they are now: a progress bar may stand in for them."""

    def __init__(self, who: str, level: int) -> None:
        super().__init__(level)
        self._who = who

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        prefix = self._who + (f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else "")
        say(prefix + record.getMessage(), error=record.levelno >= logging.WARNING)


def say(text: str, *, error: bool = False) -> None:
    """Print a line, and go on quietly when nobody listens any more (closed terminal or pipe)."""
    stream = sys.stderr if error else sys.stdout
    if stream is None:
        return
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:
        print(text.encode("ascii", "backslashreplace").decode(), file=stream, flush=True)
    except (OSError, ValueError):
        hush()


def hush() -> None:
    """Point a broken stdout or stderr at nothing, so that neither later lines nor Python's exit trip over it."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is None:
            continue
        try:
            stream.flush()
        except ValueError:
            pass  # closed already
        except OSError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)


def start_logs(path: Path, rank: int = 0) -> list[logging.Handler]:
    """Send the package's log lines to `path` and to the terminal; returns what `stop_logs` takes.

    Other processes than the first write with their rank, and only what is of their own: warnings to the file, errors to
    both.
    """
    who = f"rank {rank}: " if rank else ""
    file = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {who}%(message)s"))
    file.setLevel(logging.WARNING if rank else logging.INFO)
    handlers: list[logging.Handler] = [file, _Terminal(who, logging.ERROR if rank else logging.INFO)]
    for handler in handlers:
        _ROOT.addHandler(handler)
    _ROOT.setLevel(logging.INFO)
    return handlers


def stop_logs(handlers: list[logging.Handler]) -> None:
    for handler in handlers:
        _ROOT.removeHandler(handler)
        handler.close()
