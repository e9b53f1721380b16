"""Where a patch lies: fixed 2-D sine-cosine embeddings, and the index of relative positions.

Legend: gh gw patch grid, N = gh * gw patches in row-major order, P prefix tokens, D width.
"""

import torch
from torch import Tensor


def sincos_positions(width: int, grid: tuple[int, int], num_prefix_tokens: int = 0) -> Tensor:
    """Fixed 2-D sine-cosine position embedding as MAE has it (arXiv 2111.06377).

    The first half of the channels encodes the column and the second half the row, each as [sin, cos] of the position
    times the frequencies 10000^(-4i / D). Prefix tokens get zeros.

    Returns:
        [1, P + N, D] float32, computed in fp64.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, but the width is {width}")
    gh, gw = grid
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))

    def encode(positions: Tensor) -> Tensor:
        angle = positions.double()[:, None] * frequency
        return torch.cat((angle.sin(), angle.cos()), dim=1)  # [n, D / 2]

    columns = encode(torch.arange(gw))[None].expand(gh, -1, -1)
    rows = encode(torch.arange(gh))[:, None].expand(-1, gw, -1)
    patches = torch.cat((columns, rows), dim=2).flatten(0, 1)
    return torch.cat((patches.new_zeros(num_prefix_tokens, width), patches)).float()[None]


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
