"""How long training waits for its images, and a word about it when that is much."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

logger = logging.getLogger(__name__)

MUCH = 0.2  # share of the time
_LINES = 3  # logged steps in a row that must show it; the very first, when everything starts, is passed over


class DataWait:
    """Seconds that the device has nothing to do because the next batch is not there.

    On a CPU that is the time that the loader takes to answer. A GPU is busy with the steps that were issued before, so
    there a wait counts only as far as the device was idle between two steps, by its own clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self._pending: list[tuple[float, Any, Any]] = []  # (host's seconds, end of the step before, begin of the next)
        self._seconds = self._asked = 0.0
        self._end: Any = None

    def ask(self) -> None:
        """The loader is asked for a batch."""
        self._asked = time.perf_counter()

    def begin(self) -> None:
        """The batch is there; the step begins."""
        waited = time.perf_counter() - self._asked
        if self._end is None:
            self._seconds += waited
        else:
            self._pending.append((waited, self._end, _now()))

    def end(self) -> None:
        """All of the step has been issued."""
        if self._events:
            self._end = _now()

    def read(self) -> float:
        """Seconds since the last reading, up to the last step. To be called when the device was waited for anyway."""
        for waited, end, begin in self._pending:
            begin.synchronize()
            self._seconds += min(waited, end.elapsed_time(begin) / 1e3)
        self._pending.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def _now() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class WaitHint:
    """One line in the log, once, when the waiting is much: what `advice` has to say at that moment."""

    def __init__(self, advice: Callable[[], str]) -> None:
        self._advice: Callable[[], str] | None = advice
        self._seen: list[float] = []

    def update(self, values: Mapping[str, Any]) -> None:
        """Called with the values of each logged step."""
        self._seen.append(values["data_wait"])
        last = self._seen[1:][-_LINES:]
        if self._advice is not None and len(last) == _LINES and min(last) > MUCH:
            share = f"{sum(last) / _LINES:.0%}".replace("%", " %")
            logger.warning("Training waits for images %s of the time: %s.", share, self._advice())
            self._advice = None
