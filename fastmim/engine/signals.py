"""SIGINT, SIGTERM and SIGUSR1 as a request: the handler sets a flag, the trainer looks at it between steps."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from fastmim.engine.errors import CTRL_C, PREEMPTED

_ECHO = 0.5  # seconds; timeout(1) and some schedulers send one request twice
_CODES = {signal.SIGINT: CTRL_C, signal.SIGTERM: PREEMPTED, signal.SIGUSR1: PREEMPTED}


class StopSignals:
    """While entered, `received` is the first signal that asked to stop, or None. A second one exits at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._owner = 0
        self._since = 0.0

    @property
    def code(self) -> int:
        """The exit code that belongs to `received`."""
        return _CODES[self.received] if self.received is not None else 0

    def __enter__(self) -> "StopSignals":
        self._owner = os.getpid()
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._handle) for number in _CODES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        code = _CODES[signal.Signals(number)]
        if os.getpid() != self._owner:  # a forked loader process: Ctrl-C is the parent's to answer
            if number != signal.SIGINT:
                os._exit(code)
        elif self.received is None:
            self.received, self._since = signal.Signals(number), time.monotonic()
        elif number != self.received or time.monotonic() - self._since > _ECHO:
            os._exit(code)
