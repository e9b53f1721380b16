"""Between dense feature maps and tiles.

Legend: B batch, C channels, H W map, (gh, gw) grid of cells, N = gh * gw, K visible, t = H / gh = W / gw tile side.
"""

from typing import Any

import torch
from torch import Tensor

from fastmim.ops.backends import Backends, compiled
from fastmim.ops.tile_index import TileIndex

__all__ = ["check_tiles", "gather_tiles", "gather_tiles_ref", "scatter_tiles", "scatter_tiles_ref"]

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # as csrc/cpu/tiles.h has them
_whole = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_gather = Backends(
    "gather_tiles", cpu="gather_tiles", triton="fastmim.kernels.tiles", dtypes={"cpu": (*ELEMENTS, *_whole)}
)
_scatter = Backends("scatter_tiles", cpu="scatter_tiles", triton="fastmim.kernels.tiles", dtypes={"cpu": ELEMENTS})


def gather_tiles_ref(dense: Tensor, tiles: TileIndex) -> Tensor:
    """What `gather_tiles` means, in plain PyTorch. Any device, any dtype, differentiable."""
    (gh, gw), (batch, channels, height, _) = tiles.grid, dense.shape
    side = height // gh
    cells = dense.reshape(batch, channels, gh, side, gw, side).permute(0, 2, 4, 3, 5, 1)  # [B, gh, gw, t, t, C]
    image = torch.arange(batch, device=dense.device).unsqueeze(1)
    return cells[image, tiles.ids_keep // gw, tiles.ids_keep % gw].contiguous()


def scatter_tiles_ref(x: Tensor, tiles: TileIndex, fill: Tensor | None = None) -> Tensor:
    """What `scatter_tiles` means, in plain PyTorch. Any device, any dtype, differentiable."""
    (gh, gw), (batch, _, side, _, channels) = tiles.grid, x.shape
    image = torch.arange(batch, device=x.device).unsqueeze(1)
    slots = tiles.slots.reshape(batch, gh * gw, 1, 1, 1)
    masked = x.new_zeros(()) if fill is None else fill.to(x.dtype)
    cells = torch.where(slots >= 0, x[image, tiles.slots.clamp(min=0).long()], masked)
    rows = cells.reshape(batch, gh, gw, side, side, channels).transpose(2, 3)
    return rows.reshape(batch, gh * side, gw * side, channels).permute(0, 3, 1, 2)


def gather_tiles(dense: Tensor, tiles: TileIndex, *, backend: str | None = None) -> Tensor:
    """The visible cells of a feature map (or of an image) as tiles.

    Args:
        dense: [B, C, H, W], any dtype and strides; H = gh * t and W = gw * t.
        tiles: the visible cells.
        backend: "reference", "cpu" or "triton"; chosen by device when None.

    Returns:
        [B, K, t, t, C] contiguous, in the order of `tiles.ids_keep`. Differentiable.

    Raises:
        ValueError: a map that is not a whole number of square cells, or another batch than the tiles'; or a backend
            asked for by name that cannot run, with its reason.
    """
    gh, gw = tiles.grid
    if dense.dim() != 4 or dense.shape[0] != tiles.batch:
        raise ValueError(f"gather_tiles: expected a map [{tiles.batch}, C, H, W], got {list(dense.shape)}")
    height, width = dense.shape[2:]
    side = height // gh
    if side < 1 or (height, width) != (gh * side, gw * side):
        raise ValueError(
            f"gather_tiles: a map of {height} x {width} is not a {gh} x {gw} grid of square cells ({list(dense.shape)})"
        )
    chosen = _gather.choose(dense.device, dense.dtype, backend)
    if chosen == "reference":
        return gather_tiles_ref(dense, tiles)
    return torch.ops.fastmim.gather_tiles(dense, tiles.ids_keep, tiles.slots, gh, gw, chosen)


def scatter_tiles(x: Tensor, tiles: TileIndex, fill: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Tiles back in their places of a dense feature map.

    Args:
        x: [B, K, t, t, C].
        tiles: the visible cells.
        fill: [C], what masked cells hold (a mask token); zero when None.
        backend: "reference", "cpu" or "triton"; chosen by device when None.

    Returns:
        [B, C, H, W] in memory format channels_last. Differentiable with respect to `x` and `fill`.

    Raises:
        ValueError: tiles or a token that do not fit the index, naming both; or a backend asked for by name that
            cannot run, with its reason.
    """
    check_tiles("scatter_tiles", x, tiles)
    if fill is not None and fill.shape != x.shape[4:]:
        raise ValueError(f"scatter_tiles: fill must be [{x.shape[4]}], as x has channels, got {list(fill.shape)}")
    chosen = _scatter.choose(x.device, x.dtype, backend)
    if chosen == "reference":
        return scatter_tiles_ref(x, tiles, fill)
    fill = None if fill is None else fill.to(x.dtype)
    return torch.ops.fastmim.scatter_tiles(x, fill, tiles.ids_keep, tiles.slots, *tiles.grid, chosen)


_index = "Tensor ids_keep, Tensor slots, int gh, int gw, str backend"
torch.library.define("fastmim::gather_tiles", f"(Tensor dense, {_index}) -> Tensor")
torch.library.define("fastmim::scatter_tiles", f"(Tensor x, Tensor? fill, {_index}) -> Tensor")
torch.library.define("fastmim::masked_sum", f"(Tensor dense, {_index}) -> Tensor")  # [C], over masked positions


@torch.library.register_fake("fastmim::gather_tiles")
def _empty_tiles(dense: Tensor, ids_keep: Tensor, slots: Tensor, gh: int, gw: int, backend: str) -> Tensor:
    _, channels, height, width = dense.shape
    return dense.new_empty((*ids_keep.shape, height // gh, width // gw, channels))


@torch.library.register_fake("fastmim::scatter_tiles")
def _empty_map(
    x: Tensor, fill: Tensor | None, ids_keep: Tensor, slots: Tensor, gh: int, gw: int, backend: str
) -> Tensor:
    batch, _, side, _, channels = x.shape
    return x.new_empty((batch, gh * side, gw * side, channels)).permute(0, 3, 1, 2)


@torch.library.register_fake("fastmim::masked_sum")
def _empty_sum(dense: Tensor, ids_keep: Tensor, slots: Tensor, gh: int, gw: int, backend: str) -> Tensor:
    return dense.new_empty((dense.shape[1],))


@torch.library.impl("fastmim::gather_tiles", ("cpu", "cuda"))
def _run_gather(dense: Tensor, ids_keep: Tensor, slots: Tensor, gh: int, gw: int, backend: str) -> Tensor:
    ids_keep, x = ids_keep.contiguous(), _empty_tiles(dense, ids_keep, slots, gh, gw, backend)
    if backend == "triton":
        _gather.triton().gather_tiles(dense, ids_keep, (gh, gw), x)
    else:
        shape, at = _shape(x, gh, gw), (dense.data_ptr(), dense.stride())
        compiled().gather_tiles(shape, dense.element_size(), *at, ids_keep.data_ptr(), x.data_ptr())
    return x


@torch.library.impl("fastmim::scatter_tiles", ("cpu", "cuda"))
def _run_scatter(
    x: Tensor, fill: Tensor | None, ids_keep: Tensor, slots: Tensor, gh: int, gw: int, backend: str
) -> Tensor:
    dense, x, slots = _empty_map(x, fill, ids_keep, slots, gh, gw, backend), x.contiguous(), slots.contiguous()
    fill = None if fill is None else fill.contiguous()
    if backend == "triton":
        _scatter.triton().scatter_tiles(x, fill, slots, (gh, gw), dense)
    else:
        token = 0 if fill is None else fill.data_ptr()
        shape, where = _shape(x, gh, gw), (slots.data_ptr(), dense.data_ptr())
        compiled().scatter_tiles(shape, x.element_size(), x.data_ptr(), token, *where)
    return dense


@torch.library.impl("fastmim::masked_sum", ("cpu", "cuda"))
def _run_sum(dense: Tensor, ids_keep: Tensor, slots: Tensor, gh: int, gw: int, backend: str) -> Tensor:
    slots = slots.contiguous()
    if backend == "triton":
        return _scatter.triton().masked_sum(dense, slots, (gh, gw))
    shape = (*ids_keep.shape, gh, gw, dense.shape[2] // gh, dense.shape[1])
    out, at = _empty_sum(dense, ids_keep, slots, gh, gw, backend), (dense.data_ptr(), dense.stride())
    compiled().masked_sum(shape, ELEMENTS[dense.dtype], *at, slots.data_ptr(), out.data_ptr())
    return out


def _shape(x: Tensor, gh: int, gw: int) -> tuple[int, ...]:
    """B, K, gh, gw, t, C, as the compiled kernels take it."""
    return (*x.shape[:2], gh, gw, x.shape[2], x.shape[4])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.of, (*_, ids_keep, slots, gh, gw, backend) = inputs[0].shape, inputs
    ctx.rest = gh, gw, backend
    ctx.save_for_backward(ids_keep, slots)


# Each is the other's gradient, so both can be differentiated again.
def _differentiate_gather(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    dense = torch.ops.fastmim.scatter_tiles(gradient, None, *ctx.saved_tensors, *ctx.rest)
    return dense, None, None, None, None, None


def _differentiate_scatter(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x_gradient = fill_gradient = None
    if ctx.needs_input_grad[0]:
        x_gradient = torch.ops.fastmim.gather_tiles(gradient, *ctx.saved_tensors, *ctx.rest)
    if ctx.needs_input_grad[1]:
        fill_gradient = torch.ops.fastmim.masked_sum(gradient, *ctx.saved_tensors, *ctx.rest)
    return x_gradient, fill_gradient, None, None, None, None, None


def _differentiate_sum(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (ids_keep, _), (_, channels, height, _) = ctx.saved_tensors, ctx.of
    side = height // ctx.rest[0]
    x = gradient.new_zeros((*ids_keep.shape, side, side, channels))
    dense = torch.ops.fastmim.scatter_tiles(x, gradient, *ctx.saved_tensors, *ctx.rest)
    return dense, None, None, None, None, None


torch.library.register_autograd("fastmim::gather_tiles", _differentiate_gather, setup_context=_save)
torch.library.register_autograd("fastmim::scatter_tiles", _differentiate_scatter, setup_context=_save)
torch.library.register_autograd("fastmim::masked_sum", _differentiate_sum, setup_context=_save)


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
