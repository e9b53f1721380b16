"""BEiT's relative position bias: which row of its table belongs to which pair of tokens.

Legend: B batch, gh gw patch grid, N = gh * gw patches in row-major order, K visible, T tokens, H heads, R table rows.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["look_up_bias", "num_relative_positions", "relative_position_index", "visible_pairs"]


def num_relative_positions(grid: tuple[int, int]) -> int:
    """Rows of BEiT's bias table: each displacement between two patches, then cls to patch, patch to cls, cls to cls."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def relative_position_index(grid: tuple[int, int]) -> Tensor:
    """The row of BEiT's bias table for each (query, key) pair (arXiv 2106.08254).

    Returns:
        [1 + N, 1 + N] int64; row and column 0 are the cls token.
    """
    gh, gw = grid
    row = torch.arange(gh).repeat_interleave(gw)
    column = torch.arange(gw).repeat(gh)
    down = row[:, None] - row[None, :] + gh - 1
    right = column[:, None] - column[None, :] + gw - 1
    total = num_relative_positions(grid)
    index = torch.full((1 + gh * gw, 1 + gh * gw), total - 1)
    index[0, 1:] = total - 3
    index[1:, 0] = total - 2
    index[1:, 1:] = down * (2 * gw - 1) + right
    return index


def visible_pairs(index: Tensor, ids_keep: Tensor) -> Tensor:
    """`relative_position_index` restricted to the cls token and the visible patches of each image.

    Args:
        index: [1 + N, 1 + N].
        ids_keep: [B, K] int64, row-major patch positions.

    Returns:
        [B, 1 + K, 1 + K] int64.
    """
    tokens = torch.cat((ids_keep.new_zeros(ids_keep.shape[0], 1), ids_keep + 1), dim=1)
    return index[tokens[:, :, None], tokens[:, None, :]]


def look_up_bias(table: Tensor, index: Tensor) -> Tensor:
    """Table [R, H] read at index [T, T] or [B, T, T] -> bias [1 or B, H, T, T]."""
    bias = F.embedding(index, table).movedim(-1, -3)
    return (bias[None] if index.ndim == 2 else bias).contiguous()
