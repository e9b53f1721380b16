"""Notices a loss that leaps: a batch of odd images, a learning rate that is too high, a disk that returns rubbish."""

import json
import logging
import math
import statistics
from collections import deque
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

TIMES = 10.0  # above the median
_WINDOW, _FEWEST = 100, 5  # logged losses that the median is of


class SpikeWatch:
    """Compares each logged loss with the median of the logged ones before it.

    Args:
        metrics: the metrics.jsonl of the run, whose last lines are the past of one that is resumed.
    """

    def __init__(self, metrics: Path) -> None:
        self.count = 0  # spikes since the start of the run
        self._before: deque[float] = deque(maxlen=_WINDOW)
        self._spiked = False
        if metrics.exists():
            self._remember(metrics.read_text(encoding="utf-8").splitlines()[-2 * _WINDOW :])

    def look(self, step: int, loss: float) -> dict[str, int]:
        """What to add to the line of this step; the first of a row of spikes is warned of."""
        median = statistics.median(self._before) if len(self._before) >= _FEWEST else 0.0
        spiked = median > 0 and TIMES * median < loss < math.inf  # FiniteWatch answers for those
        self.count += spiked
        if spiked and not self._spiked:
            logger.warning(
                "The loss of %.4g at step %d is %.0f times %.4g, the median of the %d logged before. "
                "If it does not come back, start from an older checkpoint with a lower --optim.lr, or with "
                "--optim.clip_grad_norm.",
                *(loss, step, loss / median, median, len(self._before)),
            )
        self._spiked = spiked
        if math.isfinite(loss):
            self._before.append(loss)
        return {"loss_spikes": self.count} if self.count else {}

    def _remember(self, lines: list[str]) -> None:
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):  # a line that is not ours
                values = json.loads(line)
                loss, count = values["loss"], int(values.get("loss_spikes", 0))
                self._spiked, self.count = count > self.count, count
                if loss is not None:  # it was not finite
                    self._before.append(float(loss))
