"""Watching for non-finite steps: read what the device counted, write down which images, stop or pass over."""

import json
import logging
from collections import deque
from typing import Any

import torch
from torch import Tensor

from fastmim.engine.errors import NonFiniteError
from fastmim.engine.run_folder import RunFolder
from fastmim.engine.settings import EngineConfig
from fastmim.engine.step import TrainStep

logger = logging.getLogger(__name__)


class FiniteWatch:
    """`add` each step's image indices without waiting for anything; `check` when the host may wait."""

    def __init__(self, train_step: TrainStep, run: RunFolder, engine: EngineConfig, seed: int) -> None:
        self.skipped = 0  # steps passed over so far
        self._step, self._run, self._seed = train_step, run, seed
        self._policy, self._limit = engine.nonfinite, engine.max_skips
        self._recent: deque[tuple[int, Tensor | None]] = deque()  # steps not yet known to be finite

    def add(self, step: int, indices: Tensor | None) -> None:
        self._recent.append((step, indices))

    def check(self) -> None:
        """Raises NonFiniteError where a step since the last check was not finite and may not be skipped."""
        recent = list(self._recent)
        self._recent.clear()
        bad = int(self._step.bad_steps)
        if bad == 0:
            return
        first = int(self._step.first_bad)
        self._step.bad_steps.zero_()
        self._step.first_bad.fill_(-1)
        own = next((i.tolist() for step, i in recent if step == first and i is not None), [])
        # All processes are here, because what is bad for one is bad for all.
        indices = [index for part in self._run.world.collect(own) for index in part]
        # The gradient norms at hand are those of the newest step only.
        culprits = self._culprits() if recent and recent[-1][0] == first else []
        file = self._write({"step": first + 1, "seed": self._seed, "indices": indices, "parameters": culprits})
        shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "") if indices else "unknown"
        what = f"Loss or gradient was not finite at step {first + 1} (images {shown}; details in {file})"
        if self._policy == "stop":
            raise NonFiniteError(f"{what}. No weight was changed by it; --engine.nonfinite skip would pass over it.")
        self.skipped += bad
        if self.skipped > self._limit:
            raise NonFiniteError(f"{what}. {self.skipped} steps were skipped; engine.max_skips allows {self._limit}.")
        logger.warning("%s. Skipped; %d of at most %d.", what, self.skipped, self._limit)

    def _culprits(self) -> list[str]:
        """Parameters whose gradient is not finite, the first twenty."""
        return [name for name, norm in self._step.norms if not bool(torch.isfinite(norm))][:20]

    def _write(self, facts: dict[str, Any]) -> str:
        """Masks and crops are functions of (seed, step), so this is enough to see the batch again."""
        if not self._run.world.is_main:
            return "nonfinite.json"
        try:
            return str(self._run.write("nonfinite.json", json.dumps(facts) + "\n"))
        except OSError as error:
            logger.warning("nonfinite.json cannot be written: %s", error.strerror)
            return "no file"
