"""Pooling over the visible part of a feature map, with torch's constructors.

Legend: B batch, K visible cells, t tile side, s stride, C channels.
"""

from typing import Any

from torch import Tensor, nn

from fastmim.ops import TileIndex, masked_avg_pool2d, masked_max_pool2d
from fastmim.ops.masked_pool import COUNTS

__all__ = ["MaskedAdaptiveAvgPool2d", "MaskedAvgPool2d", "MaskedMaxPool2d"]


class MaskedMaxPool2d(nn.MaxPool2d):
    """`nn.MaxPool2d` on tiles: the largest visible value under each window.

    Args:
        args, kwargs: those of `nn.MaxPool2d`.

    Raises:
        ValueError: windows that do not map tiles to tiles, with the reason.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if reason := self.why_not(self):
            raise ValueError(f"MaskedMaxPool2d: {reason}")

    @staticmethod
    def why_not(layer: nn.MaxPool2d) -> str:
        """Empty when this pooling can run on tiles, else the reason."""
        if _one(layer.dilation) != 1 or layer.return_indices:
            return "dilation and return_indices are not supported"
        return _why_no_window(layer)

    def forward(self, x: Tensor, tiles: TileIndex) -> Tensor:  # type: ignore[override]
        """[B, K, t, t, C] -> [B, K, t / s, t / s, C]."""
        return masked_max_pool2d(x, tiles, _one(self.kernel_size), _one(self.stride), _one(self.padding))


class MaskedAvgPool2d(nn.AvgPool2d):
    """`nn.AvgPool2d` on tiles: the mean of the visible values under each window.

    Args:
        args, kwargs: those of `nn.AvgPool2d`. Padding is never counted.
        count: "visible" divides by the number of visible positions under the window, the true mean; "window" by all of
            them, as SparK's code does.

    Raises:
        ValueError: windows that do not map tiles to tiles, or an unknown `count`.
    """

    count = "visible"

    def __init__(self, *args: Any, count: str = "visible", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if count not in COUNTS:
            raise ValueError(f"MaskedAvgPool2d: count must be one of {', '.join(COUNTS)}, got {count!r}")
        self.count = count
        if reason := _why_no_window(self):
            raise ValueError(f"MaskedAvgPool2d: {reason}")

    @staticmethod
    def why_not(layer: nn.AvgPool2d) -> str:
        """Empty when tiles of a whole image give what this dense pooling gives, else the reason."""
        if _one(layer.padding) != 0 and layer.count_include_pad:
            return "it counts padding; count_include_pad=False averages over what there is"
        if layer.divisor_override is not None:
            return "divisor_override is not supported"
        return _why_no_window(layer)

    def forward(self, x: Tensor, tiles: TileIndex) -> Tensor:  # type: ignore[override]
        """[B, K, t, t, C] -> [B, K, t / s, t / s, C]."""
        # A plain nn.AvgPool2d may be run by this function too; it has no `count`.
        count = getattr(self, "count", "visible")
        return masked_avg_pool2d(x, tiles, _one(self.kernel_size), _one(self.stride), _one(self.padding), count=count)


class MaskedAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """Global average pooling over the visible positions of each image.

    Args:
        output_size: 1, the only size that tiles have.
    """

    def __init__(self, output_size: int | tuple[int, int] = 1) -> None:
        super().__init__(output_size)
        if reason := self.why_not(self):
            raise ValueError(f"MaskedAdaptiveAvgPool2d: {reason}")

    @staticmethod
    def why_not(layer: nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d) -> str:
        """Empty when this pooling can run on tiles, else the reason."""
        size = layer.output_size
        return "" if size in (1, (1, 1), [1, 1]) else f"output_size is {size}, only 1 is supported"

    def forward(self, x: Tensor, tiles: TileIndex) -> Tensor:  # type: ignore[override]
        """[B, K, t, t, C] -> [B, 1, 1, 1, C], one position an image; `.flatten(1)` gives [B, C]."""
        return x.mean((1, 2, 3), keepdim=True)


def _one(value: Any) -> int:
    """The number that holds in both directions, -1 where the two differ."""
    if isinstance(value, int):
        return value
    return value[0] if len(set(value)) == 1 else -1


def _why_no_window(layer: nn.MaxPool2d | nn.AvgPool2d) -> str:
    kernel, stride, padding = _one(layer.kernel_size), _one(layer.stride), _one(layer.padding)
    if -1 in (kernel, stride, padding):
        return "kernel_size, stride and padding must be the same in both directions"
    # One window starts for each `stride` positions, so that a map of whole tiles gives one of whole tiles.
    if not 0 <= kernel - 2 * padding - 1 < stride or (layer.ceil_mode and kernel != stride):
        mode = ", rounded up," if layer.ceil_mode else ""
        return f"windows of {kernel} with stride {stride} and padding {padding}{mode} do not map tiles to tiles"
    return ""
