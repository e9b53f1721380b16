"""Convolution that computes only what is visible: k x k over tiles, neighbours found through the tile index.

Legend: B batch, K visible cells, t tile side, s stride, C input and O output channels, k kernel side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.ops.backends import Backends
from fastmim.ops.tile_index import TileIndex
from fastmim.ops.tiles import check_tiles, gather_tiles, scatter_tiles

__all__ = ["DENSE_KERNELS", "DEPTHWISE_KERNELS", "masked_conv2d", "masked_conv2d_ref"]

DENSE_KERNELS = (1, 3, 5, 7)
DEPTHWISE_KERNELS = (3, 5, 7)
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/cpu/element.h numbers them
_backends = {
    "masked_depthwise": Backends("masked_depthwise", dtypes={"cpu": ELEMENTS}),
    "masked_dense": Backends("masked_dense", dtypes={"cpu": ELEMENTS}),
}


def masked_conv2d_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiles: TileIndex, stride: int = 1, groups: int = 1
) -> Tensor:
    """What the operation means, in plain PyTorch: the dense convolution with masked inputs as zeros and masked outputs
    dropped. Any device, any dtype, differentiable."""
    bias = None if bias is None else bias.to(x.dtype)
    padding = weight.shape[-1] // 2
    dense = F.conv2d(scatter_tiles(x, tiles), weight.to(x.dtype), bias, stride, padding, groups=groups)
    return gather_tiles(dense, tiles)


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tiles: TileIndex,
    stride: int = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """k x k convolution of the visible part of a feature map, padding k // 2.

    Equal to the dense convolution of the map whose masked cells are zero, at the visible cells; masked cells are
    neither read nor computed, and a tap that falls on one costs nothing.

    Args:
        x: [B, K, t, t, C] tiles, floating point.
        weight: [O, C / groups, k, k] as nn.Conv2d has it; k is 1, 3, 5 or 7 (depthwise: 3, 5 or 7).
        bias: [O] or None.
        tiles: the visible cells.
        stride: 1, or 2 where t is even.
        groups: 1, or C = O for a depthwise convolution.
        backend: "reference" or "cpu"; chosen by device when None.

    Returns:
        [B, K, t / s, t / s, O] in the dtype of `x`, accumulated in fp32 (fp64 in fp64, which the reference computes).
        Under autocast `x` is cast first, as for nn.Conv2d; a weight of higher precision than `x` is used as it is by
        the kernels. Differentiable with respect to `x`, `weight` and `bias`; the gradients are deterministic.

    Raises:
        ValueError: shapes or options that do not fit, naming both; or a backend asked for by name that cannot run,
            with its reason.

    Source: the meaning is SparK's (arXiv 2301.03580, section 3.1), which computes it densely; the layout is ours.
    """
    _check(x, weight, bias, tiles, stride, groups)
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    op = "masked_dense" if groups == 1 else "masked_depthwise"
    chosen = _backends[op].choose(x.device, x.dtype, backend)
    if chosen == "reference":
        return masked_conv2d_ref(x, weight, bias, tiles, stride, groups)
    return getattr(torch.ops.fastmim, op)(x, weight, bias, tiles.neighbours, stride, chosen)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, tiles: TileIndex, stride: int, groups: int) -> None:
    """Raises ValueError in the caller's terms."""
    op = "masked_conv2d"
    check_tiles(op, x, tiles)
    channels, side = x.shape[4], x.shape[2]
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"{op}: weight must be [O, C / groups, k, k], got {list(weight.shape)}")
    out_channels, in_channels, k, _ = weight.shape
    if groups != 1 and not groups == channels == out_channels:
        raise ValueError(
            f"{op}: groups is {groups}; it must be 1, or equal to the input channels ({channels}) and the output "
            f"channels ({out_channels}) for a depthwise convolution"
        )
    if in_channels * groups != channels:
        raise ValueError(
            f"{op}: weight expects {in_channels * groups} input channels, x has {channels} (x: {list(x.shape)})"
        )
    kernels = DENSE_KERNELS if groups == 1 else DEPTHWISE_KERNELS
    if k not in kernels:
        raise ValueError(f"{op}: a {k} x {k} kernel is not supported with groups={groups}; k is one of {kernels}")
    if stride not in (1, 2) or side % stride:
        raise ValueError(
            f"{op}: stride is {stride} with tiles of {side} x {side}; it must be 1, or 2 with an even side"
        )
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"{op}: bias is {list(bias.shape)}, weight has {out_channels} output channels")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: x and {name} must share a device, got {x.device} and {tensor.device}")
