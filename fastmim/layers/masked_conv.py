"""Convolution over tiles, with nn.Conv2d's constructor and state-dict keys.

Legend: B batch, K visible cells, t tile side, s stride, C input and O output channels, k kernel side.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.ops import TileIndex, linear, masked_conv2d
from fastmim.ops.masked_conv import DENSE_KERNELS, DEPTHWISE_KERNELS, multiplies_rows_faster

__all__ = ["MaskedConv2d", "conv2d_on_tiles", "why_no_conv2d"]


class MaskedConv2d(nn.Conv2d):
    """`nn.Conv2d` on tiles: the dense convolution with masked inputs as zeros and masked outputs dropped.

    Three kinds of kernels run: 1x1; patches, whose stride is their side (4x4/4 and 2x2/2, as in ConvNeXt); and
    k x k with padding k // 2 and stride 1 or 2, dense (3, 5, 7) or depthwise (3, 5, 7). Only the last kind looks at
    neighbours; the others are matrix products over the visible rows.

    Args:
        args, kwargs: those of `nn.Conv2d`.

    Raises:
        ValueError: a convolution that does not map tiles to tiles, with the reason.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if reason := self.why_not(self):
            raise ValueError(f"MaskedConv2d: {reason}")

    @staticmethod
    def why_not(layer: nn.Conv2d) -> str:
        """Empty when this convolution can run on tiles, else the reason."""
        if layer.padding_mode != "zeros":
            return f"padding_mode is {layer.padding_mode!r}, only 'zeros' is supported"
        shape = tuple(layer.weight.shape)
        return why_no_conv2d(shape, layer.stride, layer.padding, layer.dilation, layer.groups)

    def forward(self, x: Tensor, tiles: TileIndex) -> Tensor:  # type: ignore[override]
        """[B, K, t, t, C] -> [B, K, t / s, t / s, O]."""
        return conv2d_on_tiles(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups, tiles=tiles
        )


def conv2d_on_tiles(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    tiles: TileIndex,
) -> Tensor:
    """`F.conv2d` on tiles, with its arguments, as `MaskedConv2d` does it: [B, K, t, t, C] -> [B, K, t / s, t / s, O].

    Raises:
        ValueError: a convolution that does not map tiles to tiles, with the reason.
    """
    if reason := why_no_conv2d(tuple(weight.shape), stride, padding, dilation, groups):
        raise ValueError(f"conv2d_on_tiles: {reason}")
    kernel, step = weight.shape[2], _one(stride)
    if kernel == 1 and not (x.shape[1] == tiles.count and multiplies_rows_faster(x)):
        visible = x if step == 1 else x[:, :, ::step, ::step]
        return F.linear(visible, weight.flatten(1), bias)
    if kernel == step > 1:
        return _patches(x, weight, bias, step)
    return masked_conv2d(x, weight, bias, tiles, stride=step, groups=groups)


def why_no_conv2d(
    weight: tuple[int, ...],
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> str:
    """Empty when such a convolution, with a weight of this shape, can run on tiles, else the reason."""
    out_channels, in_channels, height, width = weight
    step, around = _one(stride), _one(padding)
    if height != width or step == 0 or around == -1:
        return f"kernel {height} x {width}, stride {stride} and padding {padding} must be the same in both directions"
    if _one(dilation) != 1 and height > 1:
        return f"dilation is {dilation}, only 1 is supported"
    if groups != 1 and not (in_channels == 1 and groups == out_channels):
        return f"groups is {groups}; it must be 1, or equal to both channel counts (depthwise)"
    if padding == "same":
        around = height // 2 if step == 1 else -1
    elif padding == "valid":
        around = 0
    if height == 1 and around == 0 and groups == 1:
        return ""
    if height == step and around == 0 and groups == 1:
        return ""
    kernels = DENSE_KERNELS if groups == 1 else DEPTHWISE_KERNELS
    if height in kernels and height > 1 and around == height // 2 and step in (1, 2):
        return ""
    kind = "dense" if groups == 1 else "depthwise"
    return (
        f"a {kind} {height} x {width} kernel with stride {step} and padding {padding} does not map tiles to tiles: it "
        f"must be 1 x 1, patches (stride = kernel, no padding), or one of {kernels} with padding k // 2 and stride 1, 2"
    )


def _one(value: int | tuple[int, ...] | str) -> int:
    """The number that holds in both directions; 0 for padding in words, -1 where the two differ."""
    if isinstance(value, str):
        return 0
    if isinstance(value, int):
        return value
    return value[0] if len(set(value)) == 1 else -1


def _patches(x: Tensor, weight: Tensor, bias: Tensor | None, step: int) -> Tensor:
    """Convolution whose windows do not overlap: every window lies in one tile, so it is a matrix product."""
    batch, count, side, _, channels = x.shape
    if side % step:
        raise ValueError(f"MaskedConv2d: patches of {step} x {step} do not divide tiles of {side} x {side}")
    cells = x.reshape(batch, count, side // step, step, side // step, step, channels).transpose(3, 4)
    rows = cells.reshape(batch, count, side // step, side // step, step * step * channels)
    return linear(rows, weight.permute(0, 2, 3, 1).flatten(1), bias)
