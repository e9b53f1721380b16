"""Group norm over the visible positions of each image, and layer norm over channels.

Legend: B batch, K visible cells, t tile side, C channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.layers.rows import as_map, as_tiles
from fastmim.ops import TileIndex

__all__ = ["MaskedGroupNorm", "MaskedLayerNorm2d", "group_norm_on_tiles"]


class MaskedGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` on tiles: mean and variance of each image's visible positions. Constructor of `nn.GroupNorm`."""

    def forward(self, x: Tensor, tiles: TileIndex) -> Tensor:  # type: ignore[override]
        """[B, K, t, t, C] -> [B, K, t, t, C]."""
        return group_norm_on_tiles(x, self.num_groups, self.weight, self.bias, self.eps)


def group_norm_on_tiles(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`F.group_norm` on tiles [B, K, t, t, C]."""
    if x.numel() == 0:
        return x
    return as_tiles(F.group_norm(as_map(x), num_groups, weight, bias, eps), like=x)


class MaskedLayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of each visible position; constructor and keys of timm's LayerNorm2d.

    Args:
        num_channels: C.
        eps: added to the variance.
        affine: learn a weight and a bias.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__(num_channels, eps=eps, elementwise_affine=affine)

    def forward(self, x: Tensor, tiles: TileIndex) -> Tensor:  # type: ignore[override]
        """[B, K, t, t, C] -> [B, K, t, t, C]."""
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
