"""Learning rate and weight decay as functions of the step."""

import logging
import math
from dataclasses import dataclass

from fastmim.engine.settings import OptimConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """lr(step) for step 0 .. total_steps - 1 (the step about to be done).

    Warm-up multiplies the scheduled value by a factor that rises linearly from `warmup_start` to 1; the cosine's
    progress counts from the end of warm-up, as in MAE, A²MIM and SparK. The weight decay of a step goes along half a
    cosine over the whole run, warm-up included, as in SparK.
    """

    kind: str
    peak: float
    total_steps: int
    warmup_steps: int = 0
    min_lr: float = 0.0
    milestones: tuple[int, ...] = ()  # steps
    gamma: float = 0.1
    warmup_start: float = 0.0
    decay: float = 0.0
    decay_end: float | None = None  # None: the weight decay does not change

    @classmethod
    def of(cls, optim: OptimConfig, *, peak: float, total_steps: int, steps_per_epoch: int) -> "Schedule":
        """The schedule of a run. A warm-up that does not fit the run is shortened to a tenth of it."""
        warmup = optim.warmup_steps if optim.warmup_steps is not None else 0
        if optim.warmup_epochs is not None:
            warmup = round(optim.warmup_epochs * steps_per_epoch)
        if warmup >= total_steps:
            shortened = total_steps // 10
            if warmup > 0:
                logger.warning(
                    "Warm-up of %d steps is not shorter than the run of %d: shortened to %d.",
                    warmup,
                    total_steps,
                    shortened,
                )
            warmup = shortened
        min_lr = min(optim.min_lr, peak)
        if min_lr < optim.min_lr and optim.schedule == "cosine":
            logger.warning(
                "optim.min_lr %g is above the peak learning rate %.3g: the latter is kept.", optim.min_lr, peak
            )
        milestones = tuple(round(epoch * steps_per_epoch) for epoch in sorted(optim.milestones))
        return cls(
            optim.schedule,
            peak,
            total_steps,
            warmup,
            min_lr,
            milestones,
            optim.gamma,
            optim.warmup_start,
            optim.weight_decay,
            optim.weight_decay_end,
        )

    def lr(self, step: int) -> float:
        value = self.peak
        if self.kind == "cosine":
            progress = max(0, step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
            value = self.min_lr + (self.peak - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        elif self.kind == "multistep":
            value = self.peak * self.gamma ** sum(step >= milestone for milestone in self.milestones)
        if step < self.warmup_steps:
            value *= self.warmup_start + (1 - self.warmup_start) * step / self.warmup_steps
        return value

    def weight_decay(self, step: int) -> float:
        if self.decay_end is None:
            return self.decay
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, self.total_steps - 1))))
        return self.decay_end + (self.decay - self.decay_end) * share
