"""What one process holds of a tensor: all of it, or some of its rows.

FSDP spreads a parameter over processes by its first dimension, in equal runs of rows (the last ones may be shorter, or
empty). Whatever else trains works on these rows as plain tensors: the optimiser, averages, checkpoints.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["Piece", "Pieces", "local_part", "piece_of", "share_of_rows", "whole"]


@dataclass(frozen=True)
class Piece:
    """Rows [first, first + len(tensor)) of a tensor of `shape`."""

    tensor: Tensor
    shape: torch.Size
    first: int = 0
    spread: bool = False  # whether other processes hold the other rows; else each holds all

    def of(self, tensor: Tensor) -> "Piece":
        """The same rows of another tensor of this shape: a moment of the optimiser, an average."""
        return replace(self, tensor=tensor)

    def cut(self, tensor: Tensor) -> Tensor:
        """These rows of a whole tensor."""
        return tensor[self.first : self.first + len(self.tensor)] if self.spread else tensor


Pieces = dict[str, dict[str, Piece]]
"""By file of a checkpoint ("method", "optimizer", "ema"), then by name."""


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """The rows of a spread tensor that lie in this process, as a plain tensor in the same memory, always the same one
    for a parameter; any other tensor itself."""
    if not _is_spread(tensor):
        return tensor
    kept: Tensor | None = getattr(tensor, "rows_here", None)
    if kept is None:
        kept = tensor.rows_here = tensor.detach().to_local()  # type: ignore[attr-defined]
    return kept


def piece_of(tensor: Tensor) -> Piece:
    """What this process holds of a parameter or buffer."""
    if not _is_spread(tensor):
        return Piece(tensor, tensor.shape)
    first, _ = share_of_rows(len(tensor), dist.get_rank(), dist.get_world_size())
    return Piece(local_part(tensor), tensor.shape, first, spread=True)


def share_of_rows(rows: int, rank: int, size: int) -> tuple[int, int]:
    """(first row, number of rows) of process `rank` of `size`, as FSDP deals them out."""
    each = -(-rows // size)
    first = min(rank * each, rows)
    return first, min(each, rows - first)


@torch.no_grad()
def whole(piece: Piece) -> Tensor:
    """The tensor that this is a piece of. Where it is spread, all processes call this together."""
    if not piece.spread:
        return piece.tensor
    rows, size = piece.shape[0], dist.get_world_size()
    each = -(-rows // size)
    padded = piece.tensor.new_zeros((each, *piece.shape[1:]))
    padded[: len(piece.tensor)] = piece.tensor
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return torch.cat(parts)[:rows]


def _is_spread(tensor: Tensor) -> bool:
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor  # not before it is needed: it takes a while

    return isinstance(tensor, DTensor)
