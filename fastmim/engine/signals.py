"""SIGINT, SIGTERM and SIGUSR1 as a request: while training, the handler sets a flag, looked at between steps."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from fastmim.engine.errors import CTRL_C, PREEMPTED, Interrupted

_ECHO = 0.5  # seconds; timeout(1) and some schedulers send one request twice
CODES = {signal.SIGINT: CTRL_C, signal.SIGTERM: PREEMPTED, signal.SIGUSR1: PREEMPTED}


class _Handlers:
    """Handlers for `numbers` while entered; the ones before come back after."""

    numbers: tuple[signal.Signals, ...]

    def __init__(self) -> None:
        self._before: dict[signal.Signals, Any] = {}
        self._owner = 0

    def __enter__(self) -> Self:
        self._owner = os.getpid()
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._handle) for number in self.numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items() if self._restore(error) else ():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _restore(self, error: BaseException | None) -> bool:
        return True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class RaisingSignals(_Handlers):
    """Outside of training there is nothing to save: SIGTERM and SIGUSR1 raise Interrupted, as SIGINT raises anyway."""

    numbers = (signal.SIGTERM, signal.SIGUSR1)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        code = CODES[signal.Signals(number)]
        if os.getpid() != self._owner:  # a forked process
            os._exit(code)
        raise Interrupted(f"Stopped by {signal.Signals(number).name}; repeat the command to go on.", code)


class StopSignals(_Handlers):
    """While entered, `received` is the first signal that asked to stop, or None. A second one exits at once.

    Args:
        alone: whether this is the only process of the run. Else a second one is ignored: launchers send a signal on
            and repeat it, and end by force what takes too long.
    """

    numbers = tuple(CODES)

    def __init__(self, alone: bool = True) -> None:
        super().__init__()
        self.alone = alone
        self.received: signal.Signals | None = None
        self._since = 0.0

    def _restore(self, error: BaseException | None) -> bool:
        """Of several processes, one that ends early has more important things to say than that a launcher stops it."""
        return self.alone or error is None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        code = CODES[signal.Signals(number)]
        if os.getpid() != self._owner:  # a forked loader process: Ctrl-C is the parent's to answer
            if number != signal.SIGINT:
                os._exit(code)
        elif self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
        elif self.alone and (number != self.received or time.monotonic() - self._since > _ECHO):
            os._exit(code)
