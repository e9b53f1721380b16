"""Between dense feature maps and tiles.

Legend: B batch, C channels, H W map, (gh, gw) grid of cells, N = gh * gw, K visible, t = H / gh = W / gw tile side.
"""

import torch
from torch import Tensor

from fastmim.ops.tile_index import TileIndex

__all__ = ["check_tiles", "gather_tiles", "scatter_tiles"]


def gather_tiles(dense: Tensor, tiles: TileIndex) -> Tensor:
    """The visible cells of a feature map (or of an image) as tiles.

    Args:
        dense: [B, C, H, W], any dtype and strides; H = gh * t and W = gw * t.
        tiles: the visible cells.

    Returns:
        [B, K, t, t, C] contiguous, in the order of `tiles.ids_keep`. Differentiable.

    Raises:
        ValueError: a map that is not a whole number of square cells, or another batch than the tiles'.
    """
    gh, gw = tiles.grid
    if dense.dim() != 4 or dense.shape[0] != tiles.batch:
        raise ValueError(f"gather_tiles: expected a map [{tiles.batch}, C, H, W], got {list(dense.shape)}")
    batch, channels, height, width = dense.shape
    side = height // gh
    if side < 1 or (height, width) != (gh * side, gw * side):
        raise ValueError(
            f"gather_tiles: a map of {height} x {width} is not a {gh} x {gw} grid of square cells ({list(dense.shape)})"
        )
    cells = dense.reshape(batch, channels, gh, side, gw, side).permute(0, 2, 4, 3, 5, 1)  # [B, gh, gw, t, t, C]
    image = torch.arange(batch, device=dense.device).unsqueeze(1)
    return cells[image, tiles.ids_keep // gw, tiles.ids_keep % gw].contiguous()


def scatter_tiles(x: Tensor, tiles: TileIndex, fill: Tensor | None = None) -> Tensor:
    """Tiles back in their places of a dense feature map.

    Args:
        x: [B, K, t, t, C].
        tiles: the visible cells.
        fill: [C], what masked cells hold (a mask token); zero when None.

    Returns:
        [B, C, H, W] in memory format channels_last. Differentiable with respect to `x` and `fill`.

    Raises:
        ValueError: tiles or a token that do not fit the index, naming both.
    """
    check_tiles("scatter_tiles", x, tiles)
    (gh, gw), (batch, _, side, _, channels) = tiles.grid, x.shape
    if fill is not None and fill.shape != (channels,):
        raise ValueError(f"scatter_tiles: fill must be [{channels}], as x has channels, got {list(fill.shape)}")
    image = torch.arange(batch, device=x.device).unsqueeze(1)
    slots = tiles.slots.reshape(batch, gh * gw, 1, 1, 1)
    masked = x.new_zeros(()) if fill is None else fill.to(x.dtype)
    cells = torch.where(slots >= 0, x[image, tiles.slots.clamp(min=0).long()], masked)
    rows = cells.reshape(batch, gh, gw, side, side, channels).transpose(2, 3)
    return rows.reshape(batch, gh * side, gw * side, channels).permute(0, 3, 1, 2)


def check_tiles(op: str, x: Tensor, tiles: TileIndex) -> None:
    """Raises ValueError unless x is [B, K, t, t, C], floating point, on the device of its index."""
    if x.dim() != 5 or x.shape[2] != x.shape[3] or x.shape[:2] != (tiles.batch, tiles.count):
        raise ValueError(
            f"{op}: x must be tiles [{tiles.batch}, {tiles.count}, t, t, C] as the index has them, got {list(x.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"{op}: x must be floating point, got {x.dtype}")
    if x.device != tiles.device:
        raise ValueError(f"{op}: x and the tile index must share a device, got {x.device} and {tiles.device}")
