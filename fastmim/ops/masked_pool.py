"""Pooling over the visible part of a feature map.

Legend: B batch, K visible cells, t tile side, s stride, C channels, k window side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.ops.tile_index import TileIndex
from fastmim.ops.tiles import check_tiles, gather_tiles, scatter_tiles

__all__ = ["COUNTS", "masked_avg_pool2d", "masked_max_pool2d"]

COUNTS = ("visible", "window")


def masked_max_pool2d(
    x: Tensor, tiles: TileIndex, kernel_size: int, stride: int | None = None, padding: int = 0
) -> Tensor:
    """Largest visible value under a window; masked cells never win, whatever the sign of the values.

    After a ReLU this is SparK's form, which lets masked zeros take part.

    Args:
        x: [B, K, t, t, C] tiles, floating point.
        tiles: the visible cells.
        kernel_size: k.
        stride: step between windows, `kernel_size` when None; t must be a multiple.
        padding: positions added on each side of the map, at most k // 2.

    Returns:
        [B, K, t / s, t / s, C] in the dtype of `x`.

    Raises:
        ValueError: shapes or options that do not fit, naming both.
    """
    stride = _check("masked_max_pool2d", x, tiles, kernel_size, stride, padding)
    if x.shape[0] == 0:
        return _no_images(x, stride)
    lowest = torch.full((x.shape[4],), float("-inf"), dtype=x.dtype, device=x.device)
    return gather_tiles(F.max_pool2d(scatter_tiles(x, tiles, lowest), kernel_size, stride, padding), tiles)


def masked_avg_pool2d(
    x: Tensor,
    tiles: TileIndex,
    kernel_size: int,
    stride: int | None = None,
    padding: int = 0,
    *,
    count: str = "visible",
) -> Tensor:
    """Mean of the visible values under a window.

    Args:
        x: [B, K, t, t, C] tiles, floating point.
        tiles: the visible cells.
        kernel_size: k.
        stride: step between windows, `kernel_size` when None; t must be a multiple.
        padding: positions added on each side of the map, at most k // 2.
        count: what the sum is divided by: "visible", the visible positions under the window (the true mean); or
            "window", all k * k of them, masked and padded zeros included, as SparK's code does.

    Returns:
        [B, K, t / s, t / s, C] in the dtype of `x`.

    Raises:
        ValueError: shapes or options that do not fit, naming both.
    """
    stride = _check("masked_avg_pool2d", x, tiles, kernel_size, stride, padding)
    if count not in COUNTS:
        raise ValueError(f"masked_avg_pool2d: count must be one of {', '.join(COUNTS)}, got {count!r}")
    if x.shape[0] == 0:
        return _no_images(x, stride)
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    mean = gather_tiles(F.avg_pool2d(scatter_tiles(wide, tiles), kernel_size, stride, padding), tiles)
    if count == "visible":
        visible = scatter_tiles(torch.ones_like(wide[..., :1]), tiles)
        share = gather_tiles(F.avg_pool2d(visible, kernel_size, stride, padding), tiles)
        mean = mean / share
    return mean.to(x.dtype)


def _check(op: str, x: Tensor, tiles: TileIndex, kernel_size: int, stride: int | None, padding: int) -> int:
    """The stride. Raises ValueError unless windows of this kind map t x t tiles to t / s x t / s tiles."""
    check_tiles(op, x, tiles)
    side, stride = x.shape[2], kernel_size if stride is None else stride
    if kernel_size < 1 or stride < 1 or not 0 <= padding <= kernel_size // 2:
        raise ValueError(f"{op}: kernel_size {kernel_size}, stride {stride}, padding {padding} are no pooling window")
    # The map is a multiple of the tile, so it fits for every grid where one window starts for each s positions.
    if side % stride or not 0 <= kernel_size - 2 * padding - 1 < stride:
        raise ValueError(
            f"{op}: windows of {kernel_size} with stride {stride} and padding {padding} do not turn tiles of "
            f"{side} x {side} into whole tiles"
        )
    return stride


def _no_images(x: Tensor, stride: int) -> Tensor:
    """The output for an empty batch, which torch's pooling refuses."""
    return x[:, :, ::stride, ::stride]
