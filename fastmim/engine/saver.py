"""What a run saves and what it starts from: which process writes and reads, and what happens where it cannot."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmim.engine.checkpoint import Checkpoint, CheckpointStore, find_checkpoint
from fastmim.engine.errors import CheckpointError, DiskFullError
from fastmim.engine.metrics import cut_metrics
from fastmim.engine.run_folder import RunFolder
from fastmim.engine.settings import EngineConfig
from fastmim.engine.training_state import TrainingState

logger = logging.getLogger(__name__)

Tensors = Mapping[str, Mapping[str, Tensor]]

_FAILED_SAVES = 3  # in a row, before the run ends for want of disk


class Saver:
    """The checkpoints of one run.

    Args:
        run: the open run folder.
        state: what is saved and restored.
        facts: what is known of the run beforehand; stored in every checkpoint, and compared with those of the
            checkpoint that a run starts from.
    """

    def __init__(self, run: RunFolder, state: TrainingState, engine: EngineConfig, facts: Mapping[str, Any]) -> None:
        self.run, self.world, self.state, self.facts = run, run.world, state, dict(facts)
        self.store = CheckpointStore(run.checkpoints, engine.keep_checkpoints)
        self.newest: Path | None = None  # what this run saved or started from
        self._failed = 0

    def holds(self, step: int) -> bool:
        """Whether the newest checkpoint is that of `step`."""
        return self.newest == self.store.path_of(step)

    def save(self, step: int, course: Mapping[str, Any], *, must: bool) -> None:
        """Write the checkpoint of `step`. Called by all processes.

        All have the same weights, so the main one writes; where `must`, the others wait for it.

        Args:
            course: where the run stands (epoch, data position, random states), for `start`.
            must: the run ends here, so a full disk is an error at once.

        Raises:
            DiskFullError: it cannot be written, nor could the two before.
        """
        tensors = self.state.tensors(keep=self.world.is_main)
        if must:
            self.world.from_main(lambda: self._write(step, tensors, course, must))
        elif self.world.is_main:
            self._write(step, tensors, course, must)
        if not self.world.is_main:
            self.newest = self.store.path_of(step)

    def _write(self, step: int, tensors: Tensors, course: Mapping[str, Any], must: bool) -> None:
        try:
            self.newest = self.store.save(step, tensors, {**self.facts, **course})
            self._failed = 0
        except OSError as error:
            self._failed += 1
            newest = self.newest or "none yet"
            logger.error("No checkpoint at step %d: %s (the newest is %s)", step, error.strerror, newest)
            if must or self._failed >= _FAILED_SAVES:
                raise DiskFullError(
                    f"Checkpoints cannot be written to {self.store.folder}: {error.strerror}. The newest is {newest}; "
                    f"free some space and repeat the command with --resume auto."
                ) from None

    def start(self, resume: str, total_steps: int) -> dict[str, Any] | None:
        """Restore the checkpoint to start from, if any, and make the folder agree with it. Called by all processes.

        Args:
            resume: "auto" (the newest good one), "never", or the path of a checkpoint or run folder.

        Returns:
            What its state.json says, with "step"; None for a run that begins.

        Raises:
            CheckpointError: a checkpoint that was asked for is damaged, or does not fit this run.
        """
        found: Checkpoint | None = None

        def find() -> list[Any] | None:
            nonlocal found
            self.store.sweep()
            if resume == "auto":
                found = self.store.newest()
            elif resume != "never":
                found = find_checkpoint(Path(resume))
            return None if found is None else [str(found.path), found.state]

        told = self.world.from_main(find)
        state: dict[str, Any] | None = None
        if told is not None:
            tensors = self.world.tensors_from_main(None if found is None else found.tensors)
            state = self._restore(Checkpoint(Path(told[0]), told[1], tensors), total_steps)
        if self.world.is_main:
            self._agree_with(0 if state is None else state["step"])
        return state

    def _agree_with(self, step: int) -> None:
        """What is later than `step` belongs to a run that this one replaces."""
        for path in self.store.steps():
            if path.name > self.store.path_of(step).name:
                self.store.set_aside(path, "superseded")
        cut_metrics(self.run.metrics, step)

    def _restore(self, checkpoint: Checkpoint, total_steps: int) -> dict[str, Any]:
        path, state = checkpoint.path, checkpoint.state
        if checkpoint.step > total_steps:
            raise CheckpointError(
                f"{path} is at step {checkpoint.step}, beyond this run's {total_steps}; give more epochs or steps"
            )
        self.state.load(checkpoint)
        changed = [f"{k} {state.get(k)} -> {v}" for k, v in self.facts.items() if k != "meta" and state.get(k, v) != v]
        if changed and self.world.is_main:
            logger.warning("Resumed with changes, so the steps to come may not repeat exactly: %s", "; ".join(changed))
        if path.parent == self.store.folder:
            self.newest = path
        logger.info("Resumed from %s", path)
        return state
