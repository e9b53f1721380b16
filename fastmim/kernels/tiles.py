"""Triton kernels between dense feature maps and tiles: one pass, any layout of the map.

Legend: B batch, K visible cells, (rows, columns) grid of cells, N = rows * columns, t tile side, C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim.kernels.ahead_of_time import Config


@triton.jit
def _offset(cell, element, columns, SIDE: tl.constexpr, C, stride_c, stride_h, stride_w):
    """Of an element (y, x, c) of a cell in a map, int64."""
    y, x, c = element // (SIDE * C), element // C % SIDE, element % C
    row, column = cell // columns * SIDE + y, cell % columns * SIDE + x
    return c.to(tl.int64) * stride_c + row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w


@triton.jit
def _gather(
    dense,  # *[B, C, H, W], strided
    ids_keep,  # *[B, K] int64
    x,  # *[B, K, t, t, C] contiguous
    stride_b, stride_c, stride_h, stride_w,  # of dense
    K, columns, C,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of a tile
):  # fmt: skip
    """One program per (tile, block of its elements). Reads and writes each once."""
    tile = tl.program_id(0).to(tl.int64)  # int64, because B * K * t * t * C may exceed 2**31
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < SIDE * SIDE * C
    cell = tl.load(ids_keep + tile)
    from_ = dense + tile // K * stride_b + _offset(cell, element, columns, SIDE, C, stride_c, stride_h, stride_w)
    tl.store(x + tile * SIDE * SIDE * C + element, tl.load(from_, mask=inside), mask=inside)


@triton.jit
def _scatter(
    x,  # *[B, K, t, t, C] contiguous
    fill,  # *[C]; only with FILL
    slots,  # *[B, N] int32
    dense,  # *[B, C, H, W], strided
    stride_b, stride_c, stride_h, stride_w,  # of dense
    K, N, columns, C,
    FILL: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of a cell
):  # fmt: skip
    """One program per (cell, block of its elements). Writes each once, reads those of visible cells."""
    index = tl.program_id(0).to(tl.int64)  # b * N + cell; int64, because B * C * H * W may exceed 2**31
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < SIDE * SIDE * C
    slot = tl.load(slots + index)
    image = index // N
    from_ = x + (image * K + slot) * (SIDE * SIDE * C) + element
    value = tl.load(from_, mask=inside & (slot >= 0), other=0)
    if FILL:
        value = tl.where(slot >= 0, value, tl.load(fill + element % C, mask=inside, other=0))
    to = dense + image * stride_b + _offset(index % N, element, columns, SIDE, C, stride_c, stride_h, stride_w)
    tl.store(to, value, mask=inside)


@triton.jit
def _masked_sum(
    dense,  # *[B, C, H, W], strided
    slots,  # *[B, N] int32
    partial,  # *[parts, C] fp32, or fp64 where dense is
    stride_b, stride_c, stride_h, stride_w,  # of dense
    positions,  # B * H * W
    positions_of_part,  # a multiple of BLOCK_P
    rows, columns, C,
    SIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per (part of the positions, block of channels). Reads masked positions only, adds in their order."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(0)
    sums = tl.zeros([BLOCK_P, BLOCK_C], dtype=partial.dtype.element_ty)
    width, height = columns * SIDE, rows * SIDE
    for start in range(part * positions_of_part, tl.minimum((part + 1) * positions_of_part, positions), BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        image, y, column = position // (width * height), position // width % height, position % width
        cell = (image * rows + y // SIDE) * columns + column // SIDE
        masked = tl.load(slots + cell, mask=position < positions, other=0) < 0
        at = image.to(tl.int64) * stride_b + y.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
        from_ = dense + at[:, None] + c.to(tl.int64)[None, :] * stride_c
        sums += tl.load(from_, mask=masked[:, None] & (c < C)[None, :], other=0).to(partial.dtype.element_ty)
    tl.store(partial + part.to(tl.int64) * C + c, tl.sum(sums, axis=0), mask=c < C)


BLOCK = 1024  # elements of a program: eight a thread of four warps
BLOCK_P, BLOCK_C, PARTS = 32, 64, 256


def gather_tiles(dense: Tensor, ids_keep: Tensor, grid: tuple[int, int], x: Tensor) -> None:
    """Fills x [B, K, t, t, C], contiguous, from dense [B, C, H, W] of any strides."""
    batch, count, side, _, channels = x.shape
    if x.numel():
        blocks = triton.cdiv(side * side * channels, BLOCK)
        _gather[(batch * count, blocks)](
            dense, ids_keep, x, *dense.stride(), count, grid[1], channels, side, BLOCK, num_warps=4
        )  # fmt: skip


def scatter_tiles(x: Tensor, fill: Tensor | None, slots: Tensor, grid: tuple[int, int], dense: Tensor) -> None:
    """Fills dense [B, C, H, W] of any strides from x [B, K, t, t, C], contiguous; masked cells with fill [C] or 0."""
    batch, count, side, _, channels = x.shape
    if dense.numel():
        blocks = triton.cdiv(side * side * channels, BLOCK)
        _scatter[(batch * slots.shape[1], blocks)](
            x, x if fill is None else fill, slots, dense, *dense.stride(), count, slots.shape[1], grid[1], channels,
            fill is not None, side, BLOCK, num_warps=4,
        )  # fmt: skip


def masked_sum(dense: Tensor, slots: Tensor, grid: tuple[int, int]) -> Tensor:
    """[C]: sum of dense [B, C, H, W] over the positions of masked cells, in its dtype."""
    batch, channels, height, width = dense.shape
    positions = batch * height * width
    parts = max(1, min(PARTS, triton.cdiv(positions, 4 * BLOCK_P)))
    positions_of_part = triton.cdiv(triton.cdiv(positions, parts), BLOCK_P) * BLOCK_P
    dtype = torch.float64 if dense.dtype == torch.float64 else torch.float32
    partial = dense.new_empty((parts, channels), dtype=dtype)
    _masked_sum[(parts, triton.cdiv(channels, BLOCK_C))](
        dense, slots, partial, *dense.stride(), positions, positions_of_part, *grid, channels,
        height // grid[0], BLOCK_P, BLOCK_C, num_warps=4,
    )  # fmt: skip
    return partial.sum(0).to(dense.dtype)


_STRIDES = {f"stride_{axis}": "i32" for axis in "bchw"}


def _configs(element: str, side: int, last: bool) -> list[Config]:
    """last: channels innermost in the map."""
    types = {"columns": "i32", "C": "i32", "K": "i32"} | _STRIDES
    if last:
        del types["stride_c"]
    constants = {"SIDE": side} | ({"stride_c": 1} if last else {})
    gather = {"dense": f"*{element}", "ids_keep": "*i64", "x": f"*{element}", **types}
    scatter = {"x": f"*{element}", "fill": f"*{element}", "slots": "*i32", "dense": f"*{element}", **types, "N": "i32"}
    total = {"dense": f"*{element}", "slots": "*i32", "partial": "*fp32", **types, "rows": "i32"}
    total |= {"positions": "i32", "positions_of_part": "i32"}
    del total["K"]
    aligned = ("dense", "x", *(("C", "stride_b", "stride_h", "stride_w") if last else ()))
    return [
        Config(_gather, gather, {**constants, "BLOCK": BLOCK}, aligned=aligned),
        Config(_scatter, scatter, {**constants, "BLOCK": BLOCK, "FILL": True}, aligned=(*aligned, "fill")),
        Config(_masked_sum, total, {**constants, "BLOCK_P": BLOCK_P, "BLOCK_C": BLOCK_C}, aligned=("partial",)),
    ]


AHEAD_OF_TIME = [*_configs("bf16", 8, True), *_configs("fp32", 1, True), *_configs("fp32", 32, False)]
