"""Where a patch lies: fixed 2-D sine-cosine embeddings.

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
