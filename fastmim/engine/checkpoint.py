"""Checkpoints, complete or not there at all: step-00000200/{method,optimizer,ema}.safetensors and state.json.

Several processes may write a part each (`fastmim.engine.sharded_checkpoint`): method-00000.safetensors and so on.

A checkpoint is written into a temporary folder beside its place: tensors first, then state.json with the size and
SHA-256 of each file and of itself; everything is synced, then the folder is renamed and its parent synced. So a kill at
any moment leaves the older checkpoints and at most a temporary folder, which the next start sweeps away. Reading
verifies all of that, before a single tensor is used. Nothing here can run code: safetensors and JSON only.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastmim.engine.errors import CheckpointError
from fastmim.engine.injector import inject
from fastmim.engine.pieces import Pieces
from fastmim.engine.tensor_file import write_tensors

logger = logging.getLogger(__name__)

FORMAT, SHARDED = 1, 2  # one file each for method, optimizer and ema; several of each
_TEMPORARY = ".tmp-"


class Checkpoint:
    """A verified checkpoint, in CPU memory.

    Args:
        state: what state.json says.
        tensors: "method", "optimizer", "ema" -> name -> tensor.
    """

    def __init__(self, path: Path, state: dict[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.path, self.state, self._groups = path, state, dict(tensors)

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """All of them, whole."""
        return {name: self.group(name) for name in self.outlines()}

    def outlines(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Tensors that tell names, whole shapes and dtypes."""
        return self._groups

    def group(self, name: str) -> Mapping[str, Tensor]:
        """All tensors of one kind, whole."""
        return self._groups[name]

    def rows(self, wanted: Pieces) -> dict[str, dict[str, Tensor]]:
        """The rows that the pieces are of, in CPU memory. Names and shapes have been checked."""
        return {
            group: {name: piece.cut(self._groups[group][name]) for name, piece in pieces.items()}
            for group, pieces in wanted.items()
        }


class CheckpointStore:
    """The folder of a run's checkpoints; keeps the `keep` newest."""

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder, self.keep = folder, keep

    def sweep(self) -> None:
        """Remove what a killed run left half-written."""
        for path in self.folder.glob(f"{_TEMPORARY}*"):
            _remove(path)

    def steps(self) -> list[Path]:
        """Checkpoint folders by step, oldest first; not verified."""
        return sorted(path for path in self.folder.glob("step-*") if path.is_dir())

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of `step` is or would be."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step`, then remove the oldest. Raises OSError and leaves the others alone."""

        def write() -> Path:
            temporary = self.begin(step, sum(t.nbytes for group in tensors.values() for t in group.values()))
            try:
                files = {}
                for name, group in tensors.items():
                    inject("checkpoint_write")
                    files[f"{name}.safetensors"] = write_tensors(temporary / f"{name}.safetensors", group)
                return self.commit(temporary, {**state, "format": FORMAT, "step": step}, files)
            except BaseException:
                self.abandon(temporary)
                raise

        path = again_after_a_hiccup(write, step)
        self.prune()
        return path

    def begin(self, step: int, needed: int) -> Path:
        """A temporary folder for the checkpoint of `step`, which takes `needed` bytes."""
        needed += 1 << 20
        if shutil.disk_usage(self.folder).free < needed:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed >> 20} MiB are needed")
        temporary = self.folder / f"{_TEMPORARY}{self.path_of(step).name}-{os.getpid()}"
        temporary.mkdir()
        return temporary

    def commit(self, temporary: Path, state: dict[str, Any], files: Mapping[str, Mapping[str, int | str]]) -> Path:
        """Make a checkpoint of a temporary folder whose files are written and synced: state.json last, then the rename.

        Args:
            files: name -> {"bytes", "sha256"}.
        """
        inject("checkpoint_write")
        state = {**state, "files": files}
        state["sha256"] = _digest(state)
        with (temporary / "state.json").open("w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(temporary)
        final = self.path_of(state["step"])
        if final.exists():
            self.set_aside(final, "superseded")
        inject("rename")
        os.rename(temporary, final)
        _sync_folder(self.folder)
        return final

    def abandon(self, temporary: Path) -> None:
        """Remove what could not be written to its end."""
        shutil.rmtree(temporary, ignore_errors=True)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole. Damaged ones are named in the log and set aside."""
        for path in reversed(self.steps()):
            try:
                return read_checkpoint(path)
            except CheckpointError as error:
                logger.warning("%s It is set aside and the one before it is used.", error)
                self.set_aside(path, "damaged")
        return None

    def set_aside(self, path: Path, why: str) -> None:
        """Rename a checkpoint so that it no longer counts: "damaged-step-00000200"."""
        target, number = path.with_name(f"{why}-{path.name}"), 1
        while target.exists():
            number += 1
            target = path.with_name(f"{why}-{number}-{path.name}")
        try:
            os.rename(path, target)
        except OSError as error:
            logger.warning("%s cannot be renamed: %s", path, error.strerror)

    def prune(self) -> None:
        """Remove all but the `keep` newest."""
        whole = [path for path in self.steps() if (path / "state.json").is_file()]  # others do not count towards `keep`
        for path in (path for path in self.steps() if path < whole[-self.keep :][0]):
            doomed = path.with_name(f"{_TEMPORARY}old-{path.name}")  # so that a kill leaves no half of it
            try:
                inject("prune")
                os.rename(path, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                logger.warning("The old checkpoint %s cannot be removed: %s", path, error.strerror)


def again_after_a_hiccup(write: Callable[[], Path], step: int) -> Path:
    """`write()`, once more where the file system failed in a way that may pass."""
    try:
        return write()
    except OSError as error:
        if error.errno not in (errno.EIO, errno.ESTALE):
            raise
        logger.warning("The checkpoint of step %d is written again after: %s", step, error.strerror)
        return write()


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises CheckpointError with what is wrong."""
    state = _read_state(path)
    _verify_files(path, state["files"])
    if state["format"] == SHARDED:
        from fastmim.engine.sharded_checkpoint import ShardedCheckpoint  # which is built on this module

        return ShardedCheckpoint(path, state)
    tensors = {}
    for name in state["files"]:
        try:
            tensors[Path(name).stem] = load_file(path / name)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"Checkpoint {path} is damaged: {name} is no safetensors file ({error}).") from None
    return Checkpoint(path, state, tensors)


def _verify_files(path: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, facts in files.items():
        file = path / name
        if Path(name).name != name:
            raise CheckpointError(f"Checkpoint {path}: {name!r} is no file name.")
        if not file.is_file():
            raise CheckpointError(f"Checkpoint {path} is damaged: {name} is missing.")
        size, written = file.stat().st_size, facts["bytes"]
        if size != written:
            raise CheckpointError(f"Checkpoint {path} is damaged: {name} has {size} of the {written} bytes written.")
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != facts["sha256"]:
                raise CheckpointError(f"Checkpoint {path} is damaged: the checksum of {name} does not match.")


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that a user's path means: a checkpoint folder, or a run folder (its newest). Errors are final."""
    if (path / "state.json").exists() or path.name.startswith("step-"):
        return read_checkpoint(path)
    candidates = CheckpointStore(path / "checkpoints").steps() or CheckpointStore(path).steps()
    if not candidates:
        raise CheckpointError(f"resume: there is no checkpoint in {path}; give a checkpoint folder or a run folder")
    return read_checkpoint(candidates[-1])


def misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """What keeps `found` from being copied into `expected`, as phrases; empty when it fits."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not expected" for name in found if name not in expected]
    for name in (name for name in expected if name in found):
        here, there = expected[name], found[name]
        if here.shape != there.shape:
            problems.append(f"{name} is {list(there.shape)}, expected {list(here.shape)}")
        elif here.dtype != there.dtype:
            problems.append(f"{name} is {there.dtype}, expected {here.dtype}")
    return problems


def check_fits(what: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError naming up to five misfits."""
    problems = misfits(expected, found)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"{what} does not fit this method: {'; '.join(problems[:5])}{more}.")


def warn_if_not_finite(what: str, found: Mapping[str, Tensor]) -> None:
    """safetensors checks no values."""
    strange = [name for name, t in found.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if strange:
        logger.warning("%s holds NaN or infinite values in %s", what, ", ".join(strange[:5]))


def _read_state(path: Path) -> dict[str, Any]:
    file = path / "state.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        expected = state.pop("sha256")
    except FileNotFoundError:
        raise CheckpointError(f"Checkpoint {path} is damaged: state.json is missing.") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"Checkpoint {path} is damaged: state.json cannot be read.") from None
    if _digest(state) != expected:
        raise CheckpointError(f"Checkpoint {path} is damaged: the checksum of state.json does not match.")
    if state.get("format") not in (FORMAT, SHARDED):
        raise CheckpointError(
            f"Checkpoint {path} has format {state.get('format')}; this version reads {FORMAT} and {SHARDED}."
        )
    return state


def _digest(state: Mapping[str, Any]) -> str:
    """SHA-256 of the content, whatever the order of keys and the spacing."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(state)), sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems refuse to sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        logger.warning("%s cannot be removed: %s", path, error.strerror)
