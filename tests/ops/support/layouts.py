"""The same values in other memory layouts."""

from collections.abc import Callable

import torch
from torch import Tensor


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    """Dimension 1 innermost, for any number of dimensions."""
    if x.dim() < 3:
        return x.contiguous()
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def offset_slice(x: Tensor) -> Tensor:
    """A window into a larger tensor: no dimension dense, first element not aligned; the rest is NaN."""
    if not x.is_floating_point():
        return x
    around = torch.full([n + 3 for n in x.shape], float("nan"), dtype=x.dtype, device=x.device)
    window = around[tuple(slice(1, n + 1) for n in x.shape)]
    window.copy_(x)
    return window


LAYOUTS: list[Callable[[Tensor], Tensor]] = [contiguous, channels_last, offset_slice]
