"""The training loop."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmim.engine.run_folder import RunFolder
from fastmim.engine.settings import EngineConfig, LogConfig, OptimConfig


@dataclass
class FitResult:
    """What a finished `Trainer.fit` did."""

    step: int  # steps behind the weights, including those before a resume
    steps: int  # steps done by this call
    images: int  # images seen by this call
    seconds: float  # wall time of those steps, checkpoints and pictures left out
    images_per_second: float  # images / seconds
    data_wait: float  # share of `seconds` spent waiting for the loader
    last_loss: float | None  # loss of the last step; None when there was nothing left to do
    skipped: int  # steps skipped as non-finite
    resumed_from: int  # step of the checkpoint this call started from, 0: none
    checkpoint: Path | None  # the newest checkpoint
    picture: Path | None  # the newest reconstruction picture


class Trainer:
    """Pre-trains a method.

    Args:
        method: the `fastmim.methods.Method` to train, on any device; moved to the one the settings name.
        loader: called with the step to start at (0, or the step resumed from), returns the endless iterable of
            `RawBatch` that yields the batch of that step first. Closed (`.close()`, where it has one) at the end.
        run: the open run folder.
        batch_size: images per step (the global batch).
        total_steps: steps of the whole run; a run resumed at step k does total_steps - k.
        mean, std: per channel, of the normalised images; for uint8 batches and pictures.
        meta: JSON-able facts stored in every checkpoint (method, model, img_size, ...), for whoever loads it.
        resume: "auto" (newest good checkpoint of `run`, if any), "never", or the path of a checkpoint folder.

    Raises:
        ValueError: settings that do not fit each other.
        RunError: with the exit code of the command; see `fastmim.engine.errors`.
    """

    def __init__(
        self,
        method: Any,
        loader: Callable[[int], Iterable[Any]],
        run: RunFolder,
        optim: OptimConfig,
        engine: EngineConfig,
        log: LogConfig,
        *,
        batch_size: int,
        total_steps: int,
        steps_per_epoch: int,
        seed: int,
        mean: Sequence[float],
        std: Sequence[float],
        meta: Mapping[str, Any],
        resume: str | Path = "auto",
    ) -> None:
        raise NotImplementedError

    def fit(self) -> FitResult:
        raise NotImplementedError
