"""Norms of gradients and clipping by them, all on the device."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def gradient_norms(
    gradients: Sequence[Tensor], add_up: Callable[[Tensor], Tensor] | None = None
) -> tuple[list[Tensor], Tensor]:
    """The norm of each gradient and that of all together (not finite if any element is not).

    `add_up`: where each process holds some rows of every gradient, makes sums over these sums over all rows.
    """
    norms = list(torch._foreach_norm(list(gradients)))
    if add_up is not None:
        norms = list(add_up(torch.stack(norms).square()).sqrt().unbind())
    return norms, torch.linalg.vector_norm(torch.stack(norms))


def clip_gradients(
    gradients: Sequence[Tensor], norms: Sequence[Tensor], total: Tensor, limit: float, mode: str
) -> None:
    """Scale gradients in place so that the norm of all ("global") or of each ("per_tensor") is at most `limit`."""
    if mode == "global":
        torch._foreach_mul_(list(gradients), (limit / (total + 1e-6)).clamp(max=1.0))
    else:
        scales = (limit / (torch.stack(list(norms)) + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(list(gradients), list(scales.unbind()))
