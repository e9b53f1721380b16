"""Random masks the plain way: noise, two argsorts, gathers, and masks repeated to every resolution.

Legend: B batch, N cells, K kept. `noise` [B, N] may be given, so that a test can ask for a certain mask.
"""

import torch
from torch import Tensor


def shuffle(batch: int, cells: int, device: torch.device, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """(ids_shuffle, ids_restore), each [B, N]."""
    if noise is None:
        noise = torch.rand(batch, cells, device=device)
    ids_shuffle = torch.argsort(noise, dim=1)
    return ids_shuffle, torch.argsort(ids_shuffle, dim=1)


def cell_mask(batch: int, cells: int, keep: int, device: torch.device, noise: Tensor | None) -> Tensor:
    """[B, N] float, 1 = removed."""
    _, ids_restore = shuffle(batch, cells, device, noise)
    mask = torch.ones(batch, cells, device=device)
    mask[:, :keep] = 0
    return torch.gather(mask, 1, ids_restore)


def repeat_mask(mask: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Cell mask [B, N] on `grid` nearest-repeated to [B, 1, H, W] of `size`."""
    mask = mask.reshape(-1, 1, *grid)
    return mask.repeat_interleave(size[0] // grid[0], dim=2).repeat_interleave(size[1] // grid[1], dim=3)
