"""Rows of a sequence by their positions.

Legend: B batch, N positions, K visible, M removed, T tokens, C channels.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["inverse_permutation", "take_rows"]


def inverse_permutation(ids: Tensor) -> Tensor:
    """Permutations [B, N] -> their inverses: `ids_restore` -> ids_shuffle, visible positions first, then removed."""
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return torch.empty_like(ids).scatter_(1, ids, positions)


class _TakeRows(torch.autograd.Function):
    """Each row is taken at most once, so the gradient is a copy: nothing is added up, in no order."""

    @staticmethod
    def forward(x: Tensor, ids: Tensor) -> Tensor:
        return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[2]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, ids = inputs
        ctx.save_for_backward(ids)
        ctx.rows = x.shape[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        zeros = grad.new_zeros(grad.shape[0], ctx.rows, grad.shape[2])
        return zeros.scatter(1, ids.unsqueeze(-1).expand_as(grad), grad), None


def take_rows(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` [B, M] of x [B, T, C], no row twice in one image -> [B, M, C]."""
    return _TakeRows.apply(x, ids)
