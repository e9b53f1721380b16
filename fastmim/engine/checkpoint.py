"""Checkpoints, complete or not there at all: step-00000200/{method,optimizer,ema}.safetensors and state.json.

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
from collections.abc import Mapping
from dataclasses import dataclass
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

FORMAT = 1
_TEMPORARY = ".tmp-"


@dataclass
class Checkpoint:
    """A verified checkpoint, in CPU memory."""

    path: Path
    state: dict[str, Any]  # what state.json says
    tensors: dict[str, dict[str, Tensor]]  # "method", "optimizer", "ema" -> name -> tensor

    @property
    def step(self) -> int:
        return self.state["step"]

    def outlines(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Tensors that tell names, whole shapes and dtypes."""
        return self.tensors

    def rows(self, wanted: Pieces) -> dict[str, dict[str, Tensor]]:
        """The rows that the pieces are of, in CPU memory. Names and shapes have been checked."""
        return {
            group: {name: piece.cut(self.tensors[group][name]) for name, piece in pieces.items()}
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
        try:
            path = self._save(step, tensors, state)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ESTALE):
                raise
            logger.warning("The checkpoint of step %d is written again after: %s", step, error.strerror)
            path = self._save(step, tensors, state)
        self._prune()
        return path

    def _save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        final = self.path_of(step)
        if final.exists():
            self.set_aside(final, "superseded")
        temporary = self.folder / f"{_TEMPORARY}{final.name}-{os.getpid()}"
        try:
            self._write(temporary, tensors, {**state, "format": FORMAT, "step": step})
            inject("rename")
            os.rename(temporary, final)
            _sync_folder(self.folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return final

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

    def _write(self, folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any]) -> None:
        needed = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values()) + (1 << 20)
        if shutil.disk_usage(self.folder).free < needed:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed >> 20} MiB are needed")
        folder.mkdir()
        files = {}
        for name, group in tensors.items():
            inject("checkpoint_write")
            files[f"{name}.safetensors"] = write_tensors(folder / f"{name}.safetensors", group)
        inject("checkpoint_write")
        state["files"] = files
        state["sha256"] = _digest(state)
        with (folder / "state.json").open("w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(folder)

    def _prune(self) -> None:
        whole = [path for path in self.steps() if (path / "state.json").is_file()]  # others do not count towards `keep`
        for path in (path for path in self.steps() if path < whole[-self.keep :][0]):
            doomed = path.with_name(f"{_TEMPORARY}old-{path.name}")  # so that a kill leaves no half of it
            try:
                inject("prune")
                os.rename(path, doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                logger.warning("The old checkpoint %s cannot be removed: %s", path, error.strerror)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint. Raises CheckpointError with what is wrong."""
    state = _read_state(path)
    tensors = {}
    for name, facts in state["files"].items():
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
        try:
            tensors[file.stem] = load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"Checkpoint {path} is damaged: {name} is no safetensors file ({error}).") from None
    return Checkpoint(path, state, tensors)


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
    if state.get("format") != FORMAT:
        raise CheckpointError(f"Checkpoint {path} has format {state.get('format')}; this version reads {FORMAT}.")
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
