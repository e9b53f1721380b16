"""Pooling over the visible part of a feature map.

Legend: B batch, K visible cells, t tile side, s stride, P = t / s, C channels, k window side.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.ops.backends import Backends, compiled
from fastmim.ops.tile_index import REACH, TileIndex
from fastmim.ops.tiles import check_tiles, gather_tiles_ref, scatter_tiles_ref

__all__ = ["COUNTS", "masked_avg_pool2d", "masked_avg_pool2d_ref", "masked_max_pool2d", "masked_max_pool2d_ref"]

COUNTS = ("visible", "window")
MOST_TAPS = 256  # of a window, for the kernels: they keep the number of the chosen one in a byte
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/cpu/element.h numbers them
_max, _avg = (
    Backends(
        f"{name}2d",
        cpu=name,
        triton="fastmim.kernels.masked_pool",
        dtypes={"cpu": ELEMENTS, "triton": ELEMENTS},
    )
    for name in ("masked_max_pool", "masked_avg_pool")
)


def masked_max_pool2d_ref(x: Tensor, tiles: TileIndex, kernel_size: int, stride: int, padding: int) -> Tensor:
    """What `masked_max_pool2d` means, in plain PyTorch. Any device, any dtype, differentiable."""
    if x.shape[0] == 0:
        return x[:, :, ::stride, ::stride]  # torch's pooling refuses an empty batch
    lowest = torch.full((x.shape[4],), float("-inf"), dtype=x.dtype, device=x.device)
    return gather_tiles_ref(F.max_pool2d(scatter_tiles_ref(x, tiles, lowest), kernel_size, stride, padding), tiles)


def masked_avg_pool2d_ref(
    x: Tensor, tiles: TileIndex, kernel_size: int, stride: int, padding: int, count: str = "visible"
) -> Tensor:
    """What `masked_avg_pool2d` means, in plain PyTorch. Any device, any dtype, differentiable."""
    if x.shape[0] == 0:
        return x[:, :, ::stride, ::stride]
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    mean = gather_tiles_ref(F.avg_pool2d(scatter_tiles_ref(wide, tiles), kernel_size, stride, padding), tiles)
    if count == "visible":
        visible = scatter_tiles_ref(torch.ones_like(wide[..., :1]), tiles)
        mean = mean / gather_tiles_ref(F.avg_pool2d(visible, kernel_size, stride, padding), tiles)
    return mean.to(x.dtype)


def masked_max_pool2d(
    x: Tensor,
    tiles: TileIndex,
    kernel_size: int,
    stride: int | None = None,
    padding: int = 0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Largest visible value under a window; masked cells never win, whatever the sign of the values.

    After a ReLU this is SparK's form, which lets masked zeros take part.

    Args:
        x: [B, K, t, t, C] tiles, floating point.
        tiles: the visible cells.
        kernel_size: k.
        stride: step between windows, `kernel_size` when None; t must be a multiple.
        padding: positions added on each side of the map, at most k // 2.
        backend: "reference", "cpu" or "triton"; chosen by device when None. Windows that look further than three
            cells, or have more than 256 positions, are the reference's.

    Returns:
        [B, K, t / s, t / s, C] in the dtype of `x`. The gradient of a window goes to one position, the first of equal
        values; it is deterministic.

    Raises:
        ValueError: shapes or options that do not fit, naming both; or a backend asked for by name that cannot run,
            with its reason.
    """
    stride = _check("masked_max_pool2d", x, tiles, kernel_size, stride, padding)
    chosen = _choose(_max, x, kernel_size, padding, backend)
    if chosen == "reference":
        return masked_max_pool2d_ref(x, tiles, kernel_size, stride, padding)
    return torch.ops.fastmim.masked_max_pool(x, tiles.neighbours, kernel_size, stride, padding, chosen)[0]


def masked_avg_pool2d(
    x: Tensor,
    tiles: TileIndex,
    kernel_size: int,
    stride: int | None = None,
    padding: int = 0,
    *,
    count: str = "visible",
    backend: str | None = None,
) -> Tensor:
    """Mean of the visible values under a window, added up in fp32 (fp64 in fp64).

    Args:
        x: [B, K, t, t, C] tiles, floating point.
        tiles: the visible cells.
        kernel_size: k.
        stride: step between windows, `kernel_size` when None; t must be a multiple.
        padding: positions added on each side of the map, at most k // 2.
        count: what the sum is divided by: "visible", the visible positions under the window (the true mean); or
            "window", all k * k of them, masked and padded zeros included, as SparK's code does.
        backend: "reference", "cpu" or "triton"; chosen by device when None. Windows that look further than three
            cells, or have more than 256 positions, are the reference's.

    Returns:
        [B, K, t / s, t / s, C] in the dtype of `x`.

    Raises:
        ValueError: shapes or options that do not fit, naming both; or a backend asked for by name that cannot run,
            with its reason.
    """
    stride = _check("masked_avg_pool2d", x, tiles, kernel_size, stride, padding)
    if count not in COUNTS:
        raise ValueError(f"masked_avg_pool2d: count must be one of {', '.join(COUNTS)}, got {count!r}")
    chosen = _choose(_avg, x, kernel_size, padding, backend)
    if chosen == "reference":
        return masked_avg_pool2d_ref(x, tiles, kernel_size, stride, padding, count)
    window = kernel_size, stride, padding
    return torch.ops.fastmim.masked_avg_pool(x, tiles.neighbours, *window, count == "visible", chosen)[0]


def _choose(backends: Backends, x: Tensor, kernel_size: int, padding: int, backend: str | None) -> str:
    """The backend that runs; the reference for windows beyond the neighbour table.

    Raises:
        ValueError: a backend asked for by name that cannot run, with its reason.
    """
    chosen = backends.choose(x.device, x.dtype, backend)
    # Upwards a window looks `padding` positions beyond its tile, downwards no further (see `_check`).
    if chosen == "reference" or (padding <= REACH * x.shape[2] and kernel_size**2 <= MOST_TAPS):
        return chosen
    if backend is None:
        return "reference"
    raise ValueError(
        f"{backends.op}: backend={backend!r} cannot run: windows of {kernel_size} with padding {padding} are too large "
        f"for tiles of {x.shape[2]} x {x.shape[2]}"
    )


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


_window = "int kernel_size, int stride, int padding"
_define = torch.library.define
_define("fastmim::masked_max_pool", f"(Tensor x, Tensor neighbours, {_window}, str backend) -> (Tensor, Tensor)")
_define(
    "fastmim::masked_max_pool_backward",
    f"(Tensor gradient, Tensor chosen, Tensor neighbours, {_window}, str backend) -> Tensor",
)
_define(
    "fastmim::masked_avg_pool",
    f"(Tensor x, Tensor neighbours, {_window}, bool visible, str backend) -> (Tensor, Tensor)",
)
_define(
    "fastmim::masked_avg_pool_backward",
    f"(Tensor gradient, Tensor share, Tensor neighbours, {_window}, str backend) -> Tensor",
)


def _output(x: Tensor, stride: int) -> Tensor:
    """[B, K, P, P, C], not yet written."""
    batch, count, side, _, channels = x.shape
    return x.new_empty((batch, count, side // stride, side // stride, channels))


@torch.library.register_fake("fastmim::masked_max_pool")
def _fake_max(
    x: Tensor, neighbours: Tensor, kernel_size: int, stride: int, padding: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Outputs not yet written: the pooled tiles, and which tap of each window was chosen."""
    out = _output(x, stride)
    return out, out.new_empty(out.shape, dtype=torch.uint8)


@torch.library.register_fake("fastmim::masked_avg_pool")
def _fake_avg(
    x: Tensor, neighbours: Tensor, kernel_size: int, stride: int, padding: int, visible: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """Outputs not yet written: the pooled tiles, and what a tap of each window weighs."""
    out = _output(x, stride)
    return out, out.new_empty(out.shape[:4], dtype=torch.float32)


@torch.library.register_fake("fastmim::masked_max_pool_backward")
@torch.library.register_fake("fastmim::masked_avg_pool_backward")
def _empty_gradient(
    gradient: Tensor, saved: Tensor, neighbours: Tensor, kernel_size: int, stride: int, padding: int, backend: str
) -> Tensor:
    batch, count, side, _, channels = gradient.shape
    return gradient.new_empty((batch, count, side * stride, side * stride, channels))


@torch.library.impl("fastmim::masked_max_pool", ("cpu", "cuda"))
def _run_max(
    x: Tensor, neighbours: Tensor, kernel_size: int, stride: int, padding: int, backend: str
) -> tuple[Tensor, Tensor]:
    window, x, neighbours = (kernel_size, stride, padding), x.contiguous(), neighbours.contiguous()
    out, chosen = _fake_max(x, neighbours, *window, backend)
    if backend == "triton":
        _max.triton().masked_max_pool(x, neighbours, window, out, chosen)
    else:
        compiled().masked_max_pool(*_described(x, neighbours, window), *_pointers(x, out, chosen))
    return out, chosen


@torch.library.impl("fastmim::masked_avg_pool", ("cpu", "cuda"))
def _run_avg(
    x: Tensor, neighbours: Tensor, kernel_size: int, stride: int, padding: int, visible: bool, backend: str
) -> tuple[Tensor, Tensor]:
    window, x, neighbours = (kernel_size, stride, padding), x.contiguous(), neighbours.contiguous()
    out, share = _fake_avg(x, neighbours, *window, visible, backend)
    if backend == "triton":
        _avg.triton().masked_avg_pool(x, neighbours, window, visible, out, share)
    else:
        compiled().masked_avg_pool(*_described(x, neighbours, window), visible, *_pointers(x, out, share))
    return out, share


def _run_backward(
    name: str, backends: Backends, gradient: Tensor, saved: Tensor, neighbours: Tensor, window: Any, backend: str
) -> Tensor:
    gradient, saved, neighbours = gradient.contiguous(), saved.contiguous(), neighbours.contiguous()
    x_gradient = _empty_gradient(gradient, saved, neighbours, *window, backend)
    if backend == "triton":
        getattr(backends.triton(), name)(gradient, saved, neighbours, window, x_gradient)
    else:
        described = _described(x_gradient, neighbours, window)
        getattr(compiled(), name)(*described, *_pointers(gradient, saved, x_gradient))
    return x_gradient


@torch.library.impl("fastmim::masked_max_pool_backward", ("cpu", "cuda"))
def _run_max_backward(gradient: Tensor, chosen: Tensor, neighbours: Tensor, *window_and_backend: Any) -> Tensor:
    *window, backend = window_and_backend
    return _run_backward("masked_max_pool_backward", _max, gradient, chosen, neighbours, window, backend)


@torch.library.impl("fastmim::masked_avg_pool_backward", ("cpu", "cuda"))
def _run_avg_backward(gradient: Tensor, share: Tensor, neighbours: Tensor, *window_and_backend: Any) -> Tensor:
    *window, backend = window_and_backend
    return _run_backward("masked_avg_pool_backward", _avg, gradient, share, neighbours, window, backend)


def _described(x: Tensor, neighbours: Tensor, window: Any) -> tuple[Any, ...]:
    """(B, K, t, C, k, s, padding), neighbours and element, as the compiled kernels take them."""
    return (*x.shape[:3], x.shape[4], *window), neighbours.data_ptr(), ELEMENTS[x.dtype]


def _pointers(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, neighbours, *window = inputs
    ctx.window, ctx.backend = window[:3], window[-1]
    ctx.save_for_backward(output[1], neighbours)
    ctx.mark_non_differentiable(output[1])


def _differentiate_max(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    operator = torch.ops.fastmim.masked_max_pool_backward
    return operator(gradient, *ctx.saved_tensors, *ctx.window, ctx.backend), *[None] * 5


def _differentiate_avg(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    operator = torch.ops.fastmim.masked_avg_pool_backward
    return operator(gradient, *ctx.saved_tensors, *ctx.window, ctx.backend), *[None] * 6


torch.library.register_autograd("fastmim::masked_max_pool", _differentiate_max, setup_context=_save)
torch.library.register_autograd("fastmim::masked_avg_pool", _differentiate_avg, setup_context=_save)
