"""Tiles seen as one feature map of visible positions, for torch's own normalisations.

Legend: B batch, K visible cells, t tile side, C channels.
"""

from torch import Tensor

__all__ = ["as_map", "as_tiles"]


def as_map(x: Tensor) -> Tensor:
    """[B, K, t, t, C] -> [B, C, K * t, t], a view in memory format channels_last: every visible position once."""
    batch, count, side, _, channels = x.shape
    return x.reshape(batch, count * side, side, channels).permute(0, 3, 1, 2)


def as_tiles(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `as_map`, in the shape of `like`."""
    return rows.permute(0, 2, 3, 1).reshape(like.shape)
