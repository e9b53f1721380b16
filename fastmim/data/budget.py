"""Keeps count of unreadable images: each file is logged once, and too many stop the run."""

import logging
from typing import Any

from fastmim.data.config import DataConfig
from fastmim.data.errors import BadDataError, printable
from fastmim.data.pipeline import MOST_IN_A_ROW, Made
from fastmim.data.sources import Source

_log = logging.getLogger("fastmim.data")


class Budget:
    """`replaced` counts rows that could not be filled with the image meant for them; `allowed` is a number of files.

    Every training process keeps its own count, of the files that it met.
    """

    def __init__(self, source: Source, cfg: DataConfig) -> None:
        self.allowed = max(20, len(source) // 100) if cfg.bad_budget is None else cfg.bad_budget
        self.replaced = 0
        self._source = source
        self._reasons: dict[int, str] = {}

    def record(self, row: Made) -> None:
        """Take note of one row.

        Raises:
            BadDataError: over budget, or nothing readable was found for the row in MOST_IN_A_ROW tries.
        """
        if not row.bad:
            return
        self.replaced += 1
        for index, reason in row.bad:
            if index not in self._reasons:
                self._reasons[index] = reason
                _log.warning("unreadable image: %s (%s)", printable(self._source.path(index)), reason)
        if len(self._reasons) > self.allowed:
            raise BadDataError(f"{self._summary()}, more than the {self.allowed} allowed. {self._advice()}")
        if len(row.bad) == MOST_IN_A_ROW:
            raise BadDataError(f"{self._summary()}, {MOST_IN_A_ROW} tries in a row. {self._advice()}")

    def state(self) -> dict[str, Any]:
        """JSON, so that a resumed run neither forgets nor reports twice."""
        return {"replaced": self.replaced, "unreadable": sorted(self._reasons.items())}

    def load_state(self, state: dict[str, Any]) -> None:
        self.replaced = int(state.get("replaced", 0))
        self._reasons = {int(index): str(reason) for index, reason in state.get("unreadable", [])}

    def _summary(self) -> str:
        count = len(self._reasons)
        return f"{count} of {len(self._source)} images could not be read" if count > 1 else "1 image could not be read"

    def _advice(self) -> str:
        examples = "; ".join(
            f"{printable(self._source.path(index))} ({reason})" for index, reason in list(self._reasons.items())[:3]
        )
        return (
            f"For example: {examples}. Remove or repair these files (the log names each one), or allow more with "
            "--data.bad_budget N."
        )
