"""What a run saves and what it starts from: which process writes and reads, when, and what happens where it cannot."""

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastmim.engine.background import Background, HostCopies
from fastmim.engine.checkpoint import SHARDED, Checkpoint, CheckpointStore, find_checkpoint
from fastmim.engine.errors import CheckpointError, DiskFullError
from fastmim.engine.metrics import cut_metrics
from fastmim.engine.pieces import Pieces
from fastmim.engine.run_folder import RunFolder
from fastmim.engine.settings import EngineConfig
from fastmim.engine.training_state import TrainingState

logger = logging.getLogger(__name__)

Job = Callable[[], Path]

_FAILED_SAVES = 3  # in a row, before the run ends for want of disk
_PATIENCE = 30.0  # seconds that a run which ends for another reason gives a save under way


class Saver:
    """The checkpoints of one run.

    In the plain format the main process writes everything, in the sharded one each process its part. Where saving is
    asynchronous, tensors are copied to host memory between two steps and written while training goes on; what became of
    it is seen at the next save, which begins when the one before has ended. The last save of a run never is.

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
        self.sharded = state.spread if engine.checkpoint == "auto" else engine.checkpoint == "sharded"
        self.beside = self.sharded if engine.async_save == "auto" else engine.async_save == "on"
        self._group = self.world.new_host_group() if self.sharded else None
        self._copies, self._job = HostCopies(), Background("checkpoint")
        self._step = 0  # of the save under way
        self._failed = 0

    def holds(self, step: int) -> bool:
        """Whether the newest checkpoint is that of `step`. Called by all processes."""
        if self._step == step:
            self._settle(forgive=True)
        return not self.world.any(self.newest != self.store.path_of(step))

    def save(self, step: int, course: Mapping[str, Any], *, must: bool) -> None:
        """Write the checkpoint of `step`. Called by all processes; where `must`, it is written when this returns.

        Args:
            course: where the run stands (epoch, data position, random states), for `start`.
            must: the run ends here, so a full disk is an error at once.

        Raises:
            DiskFullError: it cannot be written, nor could the two before.
        """
        state = {**self.facts, **course}
        if self.sharded:
            self._do(step, functools.partial(self._write_part, step, state), must)
            return
        pieces = self.state.gathered(keep=self.world.is_main)  # by all together
        write = functools.partial(self._write_all, step, pieces, state)
        if must:
            self.world.from_main(lambda: self._do(step, write, must))
        elif self.world.is_main:
            self._do(step, write, must)
        if not self.world.is_main:
            self.newest = self.store.path_of(step)

    def close(self) -> None:
        """Called at the end of training, however it ends: no job is left behind that could still succeed."""
        if isinstance(error := self._job.wait(_PATIENCE), BaseException):
            logger.error("No checkpoint at step %d: %s", self._step, error)

    def _do(self, step: int, write: Callable[[bool], Job], must: bool) -> None:
        """Save, now or beside training, once the save before is done. `write(copy)` gives what is to be run."""
        self._settle(forgive=must)  # this save is still to be tried
        self._step = step
        beside = self.beside and not must
        self._job.start(write(beside), beside=beside)
        if not beside:
            self._settle(must=must)

    def _write_part(self, step: int, state: Mapping[str, Any], copy: bool) -> Job:
        from fastmim.engine.sharded_checkpoint import save_sharded

        pieces = self.state.shares(self.world.rank, self.world.size)
        pieces = self._copies.take(pieces) if copy else pieces
        return lambda: save_sharded(self.store, step, pieces, state, rank=self.world.rank, group=self._group)

    def _write_all(self, step: int, pieces: Pieces, state: Mapping[str, Any], copy: bool) -> Job:
        pieces = self._copies.take(pieces) if copy else pieces
        tensors = {group: {name: p.tensor for name, p in part.items()} for group, part in pieces.items()}
        return lambda: self.store.save(step, tensors, state)

    def _settle(self, *, must: bool = False, forgive: bool = False) -> None:
        """Wait for the save under way, if any, and face what became of it; `forgive`: not the end of the run."""
        result = self._job.wait()
        if result is None:
            return
        if isinstance(result, Path):
            self.newest, self._failed = result, 0
            return
        if not isinstance(result, OSError):
            raise result
        self._failed += 1
        newest = self.newest or "none yet"
        if self.world.is_main:
            logger.error("No checkpoint at step %d: %s (the newest is %s)", self._step, result.strerror, newest)
        if must or (self._failed >= _FAILED_SAVES and not forgive):
            full = DiskFullError(
                f"Checkpoints cannot be written to {self.store.folder}: {result.strerror}. The newest is {newest}; "
                f"free some space and repeat the command with --resume auto."
            )
            full.of_all = self.sharded
            raise full from None

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
            state = self._restore(self._shared(found, Path(told[0]), told[1]), total_steps)
        if self.world.is_main:
            self._agree_with(0 if state is None else state["step"])
        return state

    def _shared(self, found: Checkpoint | None, path: Path, state: dict[str, Any]) -> Checkpoint:
        """The checkpoint that the main process found, in all of them."""
        if self.state.spread and state["format"] == SHARDED:  # each reads its own rows
            from fastmim.engine.sharded_checkpoint import ShardedCheckpoint

            return found or ShardedCheckpoint(path, state)
        return Checkpoint(path, state, self.world.tensors_from_main(None if found is None else found.tensors))

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
