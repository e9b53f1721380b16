"""What a training run did, and how fast."""

import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Interval:
    """Counts of the steps since the last logged one."""

    images: int = 0
    waited: float = 0.0  # seconds for the loader, on average over the processes
    paused: float = 0.0  # seconds for checkpoints and pictures
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self.began - self.paused, 1e-9)


@dataclass
class FitResult:
    """What a finished `Trainer.fit` did."""

    step: int  # steps behind the weights, including those before a resume
    steps: int = 0  # steps done by this call
    images: int = 0  # images seen by this call
    seconds: float = 0.0  # wall time of those steps, checkpoints and pictures left out
    waited: float = 0.0  # seconds of those spent waiting for the loader
    first_values: dict[str, float] = field(default_factory=dict)  # loss and parts of the first step that was logged
    last_values: dict[str, float] = field(default_factory=dict)  # of the last step; empty: nothing was left to do
    skipped: int = 0  # steps skipped as non-finite, including those before a resume
    resumed_from: int = 0  # step of the checkpoint this call started from, 0: none
    checkpoint: Path | None = None  # the newest checkpoint
    picture: Path | None = None  # the newest reconstruction picture

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds > 0 else 0.0

    @property
    def data_wait(self) -> float:
        """Share of the time spent waiting for the loader."""
        return self.waited / self.seconds if self.seconds > 0 else 0.0

    def course(self) -> str:
        """Loss and parts at the first logged step and at the end: "loss 0.93 -> 0.41, recognition 0.24 -> 0.5"."""
        told = []
        for name, value in self.last_values.items():
            first, last = f"{self.first_values[name]:.3g}", f"{value:.3g}"
            told.append(f"{name} {first} -> {last}" if first != last else f"{name} {last}")
        return ", ".join(told)

    @property
    def last_loss(self) -> float | None:
        """Of the last step; None when there was nothing left to do."""
        return self.last_values.get("loss")

    def add(self, interval: Interval, seconds: float) -> None:
        self.images += interval.images
        self.seconds += seconds
        self.waited += interval.waited
