"""What a person watches: a bar on a terminal, plain lines elsewhere."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from fastmim.engine.logs import hush, say

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0


class Progress(Protocol):
    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Called at each logged step with the values of its line in metrics.jsonl."""

    def close(self) -> None: ...


def create_progress(kind: str, start: int, total: int) -> Progress:
    """`kind` is "auto", "bar", "plain" or "none"; a bar needs rich, and auto a terminal too."""
    if kind == "none":
        return _Nothing()
    terminal = sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()
    if kind == "bar" or (kind == "auto" and terminal):
        try:
            return _Bar(start, total)
        except ImportError:
            logger.info("Plain progress lines: rich is not installed (pip install rich).")
    return _Lines(start, total)


class _Nothing:
    def update(self, step: int, values: Mapping[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class _Lines:
    """At most one line in five seconds, besides the first and the last."""

    def __init__(self, start: int, total: int) -> None:
        self._start, self._total = start, total
        self._began = time.monotonic()
        self._last = float("-inf")

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES and step != self._total:
            return
        self._last = now
        left = (now - self._began) / max(1, step - self._start) * (self._total - step)
        say(f"step {step}/{self._total}  {describe(values)}  {duration(left)} left")

    def close(self) -> None:
        pass


class _Bar:
    def __init__(self, start: int, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._bar: Any = RichProgress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            expand=True,
        )
        self._task = self._bar.add_task("train", total=total, completed=start, text="")
        self._bar.start()

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        self._try(lambda: self._bar.update(self._task, completed=step, text=describe(values)))

    def close(self) -> None:
        self._try(lambda: self._bar.stop())

    def _try(self, draw: Any) -> None:
        if self._bar is None:
            return
        try:
            draw()
        except (OSError, ValueError):  # the terminal is gone
            self._bar = None
            hush()


def describe(values: Mapping[str, Any]) -> str:
    """The numbers worth watching, as "loss 0.4312  812 images/s  data wait 3 %"."""
    rate = values["images_per_second"]
    text = (
        f"loss {values['loss']:.4f}  {rate:,.{0 if rate >= 100 else 1}f} images/s  data wait {values['data_wait']:.0%}"
    )
    return text.replace("%", " %")


def duration(seconds: float) -> str:
    """75 -> "1:15", 3700 -> "1:01:40"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
