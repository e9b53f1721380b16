"""All tensors that training changes: the method's, the optimiser's, the average's. What a checkpoint holds."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastmim.engine.checkpoint import Checkpoint, check_fits, warn_if_not_finite
from fastmim.engine.ema import Ema
from fastmim.engine.optimizer import STATE, load_optimizer_state, named_parameters, optimizer_state
from fastmim.engine.pieces import Piece, Pieces, piece_of, share_of_rows, whole
from fastmim.methods import Method


class TrainingState:
    def __init__(self, method: Method, optimizer: torch.optim.Optimizer, ema: Ema | None) -> None:
        self.method, self.optimizer, self.ema = method, optimizer, ema
        self.spread = any(piece.spread for piece in self._of_method().values())
        """Whether each process holds a part of the weights."""

    def pieces(self) -> Pieces:
        """What this process holds, by file of the checkpoint, then by name; the live tensors, not copies."""
        method = self._of_method()
        pieces = {
            "method": method,
            "optimizer": {key: _of_state(key, t, method) for key, t in optimizer_state(self.optimizer).items()},
        }
        if self.ema is not None:
            pieces["ema"] = {name: method[name].of(tensor) for name, tensor in self.ema.state_dict().items()}
        return pieces

    def gathered(self, keep: bool = True) -> Pieces:
        """The same, whole. Spread tensors are gathered by all processes together, into the CPU memory of those that
        `keep` them."""

        def gather(piece: Piece) -> Piece:
            if not piece.spread:
                return piece
            tensor = whole(piece)
            return Piece(tensor.cpu() if keep else tensor.new_empty(0), piece.shape)

        return {
            group: {name: gather(piece) for name, piece in pieces.items()} for group, pieces in self.pieces().items()
        }

    def shares(self, rank: int, size: int) -> Pieces:
        """What process `rank` of `size` is to write so that all together write everything once: its rows of spread
        tensors; as many rows of parameters, moments and averages that all processes hold alike; in the first one also
        buffers, which may differ (statistics of a process's own images), and counts."""
        alike = {name for name, _ in self.method.named_parameters()}

        def share(name: str, piece: Piece) -> Piece | None:
            if piece.spread:
                return piece
            if not piece.shape or name not in alike:
                return piece if rank == 0 else None
            first, rows = share_of_rows(piece.shape[0], rank, size)
            return Piece(piece.tensor[first : first + rows], piece.shape, first, spread=True)

        return {
            group: {
                key: mine
                for key, piece in pieces.items()
                if (mine := share(key.partition("/")[2] if group == "optimizer" else key, piece)) is not None
            }
            for group, pieces in self.pieces().items()
        }

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Check everything, then copy. A checkpoint without an average starts one at its weights.

        Raises:
            CheckpointError: names, shapes or dtypes that do not fit; nothing has been changed then.
        """
        where, there = checkpoint.path, checkpoint.outlines()
        method = self._of_method()
        wanted = {"method": method, "optimizer": self._of_optimizer(method, there.get("optimizer", {}))}
        if self.ema is not None and "ema" in there:
            wanted["ema"] = method
        for group, pieces in wanted.items():
            check_fits(f"{where}: {group}", _outlines(pieces), there.get(group, {}))
        found = checkpoint.rows(wanted)
        for group, tensors in found.items():
            warn_if_not_finite(f"{where}: {group}", tensors)
        load_optimizer_state(self.optimizer, found["optimizer"], str(where))
        for name, piece in method.items():
            piece.tensor.copy_(found["method"][name])
        if self.ema is not None:
            average = found.get("ema", found["method"])
            for name, tensor in self.ema.average.items():
                tensor.copy_(average[name])

    def _of_method(self) -> dict[str, Piece]:
        return {name: piece_of(tensor) for name, tensor in self.method.state_dict().items()}

    def _of_optimizer(self, method: dict[str, Piece], there: Mapping[str, Tensor]) -> dict[str, Piece]:
        """What the optimiser would hold, had it made the steps of a checkpoint that holds `there`."""
        present = {key.partition("/")[2] for key in there}  # a parameter that never had a gradient has no state
        count = Piece(torch.zeros(()), torch.Size())
        return {
            f"{kind}/{name}": count if kind == "step" else method[name]
            for name, _ in named_parameters(self.optimizer)
            if name in present
            for kind in STATE
        }


def _of_state(key: str, tensor: Tensor, method: dict[str, Piece]) -> Piece:
    """A tensor of the optimiser: a moment lies as its parameter does, a count of steps is the same everywhere."""
    piece = method[key.partition("/")[2]]
    return piece.of(tensor) if tensor.dim() else Piece(tensor, tensor.shape)


def _outlines(pieces: dict[str, Piece]) -> dict[str, Tensor]:
    """Shape and dtype of the whole tensors, without memory."""
    return {name: torch.empty(p.shape, dtype=p.tensor.dtype, device="meta") for name, p in pieces.items()}
