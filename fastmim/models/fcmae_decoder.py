"""FCMAE's decoder: mask tokens join the encoded visible tiles, and one dense ConvNeXt V2 block turns all into pixels.

Legend: B batch, K visible cells, N all cells, C encoder width, d decoder width, P = p*q*C values of a cell.
"""

import torch
from torch import Tensor, nn

from fastmim.layers import MaskedConv2d
from fastmim.models.convnext import ConvNeXtBlock
from fastmim.ops import TileIndex, scatter_tiles


class FCMAEDecoder(nn.Module):
    """1x1 convolution C -> d, mask token at removed cells, ConvNeXt V2 blocks over the whole map, 1x1 convolution to P.

    Keys of its parts are the official ones: proj, mask_token, pred; blocks have timm's names.

    Args:
        encoder_channels: C.
        cell_values: P, in the order of MAE (row, column, channel).
        dim, depth: of the blocks.

    Source: arXiv 2301.00808, section 3.1. It costs 0.2 GMAC at 224 pixels; deeper and wider ones gain nothing there.
    """

    def __init__(self, encoder_channels: int, cell_values: int, *, dim: int = 512, depth: int = 1) -> None:
        super().__init__()
        self.proj = MaskedConv2d(encoder_channels, dim, 1)
        self.mask_token = nn.Parameter(torch.empty(1, dim, 1, 1))
        self.blocks = nn.Sequential(*(ConvNeXtBlock(dim, ls_init_value=None, use_grn=True) for _ in range(depth)))
        self.pred = nn.Conv2d(dim, cell_values, 1)
        self.apply(_init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, features: Tensor, tiles: TileIndex) -> Tensor:
        """features: tiles [B, K, 1, 1, C]. Returns [B, N, P]."""
        x = scatter_tiles(self.proj(features, tiles), tiles, fill=self.mask_token.flatten())
        return self.pred(self.blocks(x)).flatten(2).transpose(1, 2)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
