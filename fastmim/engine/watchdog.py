"""Ends a run that makes no progress: a loader that stalls, a collective that nobody answers, a file system that hangs.

A process that waits for ever looks healthy from outside and costs its GPUs until somebody looks. So the training loop
says what it begins, and when it has said nothing for too long, the stacks of all threads go to train.log and the
process ends with code 124.
"""

import faulthandler
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from fastmim.engine.errors import HUNG

logger = logging.getLogger(__name__)

_OTHERS = 5.0  # seconds in which the other processes of the run, which wait too, can write their stacks
_WRITING = 20.0  # seconds that writing all this may take: the file system may be what hangs


class Watchdog:
    """While entered, ends the process once `at` was not called for `seconds`; 0 turns it off.

    Should C code hold Python's lock all that time, so that no thread of ours runs, faulthandler's own thread writes the
    stacks and ends the process, with code 1.

    Args:
        log: the file that the stacks are appended to.
        last_words: called with exit code and reason before the end.
        patience: seconds to leave to the other processes of the run, if there are any.
    """

    def __init__(
        self,
        seconds: float,
        log: Path,
        last_words: Callable[[int, str], None],
        *,
        patience: float = _OTHERS,
    ) -> None:
        self.where = "before the first step"
        self._seconds, self._log, self._last_words, self._patience = seconds, log, last_words, patience
        self._since = time.monotonic()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, step: int, doing: str) -> None:
        """Progress: from now on the loop does this, for step `step` counted from 1."""
        self._since = time.monotonic()
        self.where = f"{doing}, step {step}"

    def __enter__(self) -> Self:
        self._since = time.monotonic()
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._seconds:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        tick = min(self._seconds / 4, 10.0)
        try:
            with self._log.open("a") as file:
                while not self._left.wait(tick):
                    faulthandler.dump_traceback_later(self._seconds + 2 * tick, file=file, exit=True)
                    if time.monotonic() - self._since > self._seconds:
                        self._bite()
                faulthandler.cancel_dump_traceback_later()  # it holds the file
        except OSError as error:
            logger.warning("Nothing watches for hangs: %s cannot be written (%s).", self._log, error.strerror)

    def _bite(self) -> None:
        late = threading.Timer(_WRITING + self._patience, os._exit, (HUNG,))
        late.daemon = True
        late.start()
        reason = (
            f"No progress for {self._seconds:g} s ({self.where}; engine.watchdog). The stacks of all threads are in "
            f"{self._log}. Started again with --resume auto the run continues at the newest checkpoint."
        )
        logger.error("%s", reason)
        with self._log.open("a") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        self._last_words(HUNG, reason)
        for worker in multiprocessing.active_children():
            worker.kill()
        self._left.wait(self._patience)
        os._exit(HUNG)
