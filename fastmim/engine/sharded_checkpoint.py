"""Checkpoints that every process writes and reads its own rows of, by torch.distributed.checkpoint.

    step-00000200/method-00000.safetensors  method-00001.safetensors  optimizer-00000.safetensors  ...  state.json

Its planner decides which rows of which file make a tensor, so any number of processes can read what any other number
wrote. Nothing is pickled into a file: headers of safetensors files say which rows they hold, in the form that torch's
own `HuggingFaceStorageReader` reads. What makes it a checkpoint is as in `fastmim.engine.checkpoint`: the main process
writes state.json, with size and checksum of every file of every process, last, and renames the folder.
"""

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from fastmim.engine.checkpoint import SHARDED, Checkpoint, CheckpointStore, again_after_a_hiccup
from fastmim.engine.errors import CheckpointError
from fastmim.engine.injector import inject
from fastmim.engine.pieces import Piece, Pieces
from fastmim.engine.tensor_file import write_tensors

__all__ = ["ShardedCheckpoint", "save_sharded"]

_SHARED = "sharded checkpoints need a folder that all machines share, engine.checkpoint=plain does not"


def save_sharded(
    store: CheckpointStore, step: int, pieces: Pieces, state: Mapping[str, Any], *, rank: int, group: Any
) -> Path:
    """Write the checkpoint of `step`; called by all processes of `group`, each with the pieces that it is to write.

    Args:
        pieces: together they cover every tensor once.
        group: a process group of CPUs that nothing else uses meanwhile; None where there is one process.

    Raises:
        OSError: in all processes, where any of them cannot write; older checkpoints are left alone.
    """

    def write() -> Path:
        writer = _Writer(store, step, state, rank)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* in a single process")
                dcp.save(
                    {f"{name}/{key}": _Shard(p) for name, part in pieces.items() for key, p in part.items()},
                    storage_writer=writer,
                    planner=_SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    process_group=group,
                    no_dist=group is None,
                )
        except CheckpointException as error:
            writer.abandon()
            failures = [failure for failure, _ in error.failures.values()]
            raise next((f for f in failures if not isinstance(f, OSError)), failures[0]) from None
        except BaseException:
            writer.abandon()
            raise
        return store.path_of(step)

    path = again_after_a_hiccup(write, step)
    if rank == 0:
        store.prune()
    return path


class ShardedCheckpoint(Checkpoint):
    """A verified checkpoint of which only the headers are in memory; tensors are read when they are asked for."""

    def __init__(self, path: Path, state: dict[str, Any]) -> None:
        super().__init__(path, state, {})
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not seen by this process; {_SHARED}")
        strange = {file.name for file in self.path.glob("*.safetensors")} - set(self.state["files"])
        if strange:
            raise self._damaged(f"{min(strange)} does not belong to it")
        try:
            metadata = HuggingFaceStorageReader(str(self.path)).read_metadata()
            self._outlines = {key: _outline(key, facts) for key, facts in metadata.state_dict_metadata.items()}
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise self._damaged(f"its files are no safetensors files of rows ({error})") from None

    def outlines(self) -> dict[str, dict[str, Tensor]]:
        result: dict[str, dict[str, Tensor]] = {}
        for key, outline in self._outlines.items():
            group, _, name = key.partition("/")
            result.setdefault(group, {})[name] = outline
        return result

    def group(self, name: str) -> Mapping[str, Tensor]:
        if name not in self._groups:
            whole = {key: Piece(outline, outline.shape) for key, outline in self.outlines()[name].items()}
            self._groups |= self.rows({name: whole})
        return self._groups[name]

    def rows(self, wanted: Pieces) -> dict[str, dict[str, Tensor]]:
        found = {
            name: {key: torch.empty(p.tensor.shape, dtype=p.tensor.dtype) for key, p in pieces.items()}
            for name, pieces in wanted.items()
        }
        targets = {
            f"{name}/{key}": _Shard(p.of(found[name][key]))
            for name, pieces in wanted.items()
            for key, p in pieces.items()
        }
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".* in a single process")
                dcp.load(
                    targets,
                    storage_reader=HuggingFaceStorageReader(str(self.path)),
                    planner=_LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                    no_dist=True,
                )
        except CheckpointException as error:
            raise self._damaged(f"it cannot be read ({next(iter(error.failures.values()))[0]})") from None
        return found

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"Checkpoint {self.path} is damaged: {what}.")


class _Shard:
    """A piece as the planner of torch.distributed.checkpoint wants to see it."""

    def __init__(self, piece: Piece) -> None:
        self.piece = piece
        self.offsets = torch.Size([piece.first, *[0] * (len(piece.shape) - 1)][: len(piece.shape)])

    def size(self) -> torch.Size:
        return self.piece.shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        tensor = self.piece.tensor
        nothing = tensor.numel() == 0 and self.piece.first > 0
        return [] if nothing else [ChunkStorageMetadata(offsets=self.offsets, sizes=tensor.shape)]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.piece.tensor.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, self.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.piece.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].piece.tensor


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """As the default, which would drop what is no tensor."""
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].piece.tensor


class _Writer(StorageWriter):
    """Writes the plan of each process into files of its own, and in the main one the commit."""

    def __init__(self, store: CheckpointStore, step: int, state: Mapping[str, Any], rank: int) -> None:
        self._store, self._step, self._state, self._rank = store, step, state, rank
        self._folder: Path | None = None

    def abandon(self) -> None:
        if self._rank == 0 and self._folder is not None:
            self._store.abandon(self._folder)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        needed = sum(_bytes(item) for plan in plans for item in plan.items)
        self._folder = self._store.begin(self._step, needed)
        return [replace(plan, storage_data=self._folder.name) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        folder = self._store.folder / plan.storage_data
        results = []
        for name, items in _by_group(plan.items):
            inject("checkpoint_write")
            file = f"{name}-{self._rank:05d}.safetensors"
            tensors: dict[str, Tensor] = {item.index.fqn: planner.resolve_data(item) for item in items}  # type: ignore[misc]
            offsets = {item.index.fqn: {"saved_offsets": list(item.index.offset or ())} for item in items}
            facts = write_tensors(folder / file, tensors, {"DCP_SHARDING_INFO": json.dumps(offsets)})
            results += [WriteResult(item.index, _bytes(item), (file, facts)) for item in items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self._folder is not None
        files = dict(result.storage_data for part in results for result in part)
        for file, facts in files.items():
            path = self._folder / file
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                raise CheckpointError(
                    f"{path} of {facts['bytes']} bytes was written by another process and is not seen here; {_SHARED}"
                )
        self._store.commit(self._folder, {**self._state, "format": SHARDED, "step": self._step}, files)

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def _by_group(items: Iterable[WriteItem]) -> Iterator[tuple[str, list[WriteItem]]]:
    """("method", its items) and so on."""
    groups: dict[str, list[WriteItem]] = {}
    for item in items:
        groups.setdefault(item.index.fqn.partition("/")[0], []).append(item)
    yield from groups.items()


def _outline(name: str, facts: Any) -> Tensor:
    """A tensor without memory. Raises ValueError unless the runs of rows in the files make up all of it."""
    assert isinstance(facts, TensorStorageMetadata)
    row, shape = 0, facts.size
    for chunk in sorted(facts.chunks, key=lambda chunk: tuple(chunk.offsets)):
        if shape and (chunk.offsets[0] != row or any(chunk.offsets[1:]) or chunk.sizes[1:] != shape[1:]):
            raise ValueError(f"rows of {name} are missing or doubled")
        row += chunk.sizes[0] if shape else 1
    if row != (shape[0] if shape else 1):
        raise ValueError(f"rows of {name} are missing or doubled")
    return torch.empty(shape, dtype=facts.properties.dtype, device="meta")
