"""Triton kernels for pooling over tiles.

Legend: B batch, K visible cells, t tile side, s stride, P = t / s, C channels, k window side. A row is a position
(tile, y, x); it meets, at each tap, one row of the other tensor or none.

Backward is a gather too: an input position adds up, tap by tap, what the windows over it hand back.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastmim.kernels.ahead_of_time import Config

REACH, WINDOW = tl.constexpr(3), tl.constexpr(7)  # of the neighbour table


@triton.jit
def _met(
    neighbours,  # *[B, K, 7, 7] int32
    tile,  # int32 [BLOCK_M]
    row, column,  # int32 [BLOCK_M], position in the other tensor counted from the tile's first; may lie outside of it
    inside,  # whether the position exists
    count,  # K
    SIDE: tl.constexpr,  # of the tiles met
):  # fmt: skip
    """(row met, int64; whether there is one)."""
    up = (row + REACH * SIDE) // SIDE  # cells away, plus the reach: never negative, so rounding down is truncation
    left = (column + REACH * SIDE) // SIDE
    near = tl.load(neighbours + tile.to(tl.int64) * WINDOW * WINDOW + up * WINDOW + left, mask=inside, other=-1)
    there = (tile - tile % count + near).to(tl.int64)  # int64, because B * K * t * t * C may exceed 2**31
    return (there * SIDE + row - (up - REACH) * SIDE) * SIDE + column - (left - REACH) * SIDE, near >= 0


@triton.jit
def _max_pool(
    x,  # *[B, K, t, t, C] contiguous
    neighbours,  # *[B, K, 7, 7] int32
    out,  # *[B, K, P, P, C] contiguous
    chosen,  # *[B, K, P, P, C] uint8: number of the tap
    rows,  # B * K * P * P
    count,  # K
    C,
    P: tl.constexpr,
    STRIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per (block of rows, block of channels). Reads k * k rows an output, mostly from the cache."""
    m, c = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tile, y, x_ = m // (P * P), m // P % P, m % P
    best = tl.full([BLOCK_M, BLOCK_C], float("-inf"), tl.float32)
    which = tl.full([BLOCK_M, BLOCK_C], KERNEL * KERNEL, tl.int32)  # none yet
    for tap in range(KERNEL * KERNEL):
        row, column = y * STRIDE + tap // KERNEL - PADDING, x_ * STRIDE + tap % KERNEL - PADDING
        met, there = _met(neighbours, tile, row, column, m < rows, count, P * STRIDE)
        mask = there[:, None] & (c < C)[None, :]
        value = tl.load(x + met[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        # As torch's: the first of equal values, and the last NaN.
        better = mask & ((value > best) | (value != value) | (which == KERNEL * KERNEL))
        best, which = tl.where(better, value, best), tl.where(better, tap, which)
    to = m.to(tl.int64)[:, None] * C + c[None, :]
    mask = (m < rows)[:, None] & (c < C)[None, :]
    tl.store(out + to, best.to(out.dtype.element_ty), mask=mask)
    tl.store(chosen + to, which.to(tl.uint8), mask=mask)


@triton.jit
def _avg_pool(
    x,  # *[B, K, t, t, C] contiguous
    neighbours,  # *[B, K, 7, 7] int32
    out,  # *[B, K, P, P, C] contiguous
    share,  # *[B, K, P, P] fp32: what a tap weighs
    rows,  # B * K * P * P
    count,  # K
    C,
    VISIBLE: tl.constexpr,  # divide by the visible positions under the window, else by k * k
    P: tl.constexpr,
    STRIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per (block of rows, block of channels). Reads k * k rows an output, mostly from the cache."""
    m, c = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tile, y, x_ = m // (P * P), m // P % P, m % P
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    seen = tl.zeros([BLOCK_M], tl.int32)
    for tap in range(KERNEL * KERNEL):
        row, column = y * STRIDE + tap // KERNEL - PADDING, x_ * STRIDE + tap % KERNEL - PADDING
        met, there = _met(neighbours, tile, row, column, m < rows, count, P * STRIDE)
        mask = there[:, None] & (c < C)[None, :]
        total += tl.load(x + met[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        seen += there.to(tl.int32)
    weight = 1.0 / tl.where(seen > 0, seen, 1).to(tl.float32) if VISIBLE else 1.0 / (KERNEL * KERNEL)
    weight = tl.zeros([BLOCK_M], tl.float32) + weight
    to = m.to(tl.int64)[:, None] * C + c[None, :]
    mask = (m < rows)[:, None] & (c < C)[None, :]
    tl.store(out + to, (total * weight[:, None]).to(out.dtype.element_ty), mask=mask)
    tl.store(share + m, weight, mask=(m < rows) & (tl.program_id(1) == 0))


@triton.jit
def _pool_backward(
    gradient,  # *[B, K, P, P, C] contiguous
    chosen,  # *[B, K, P, P, C] uint8; only with LARGEST
    share,  # *[B, K, P, P] fp32; only without
    neighbours,  # *[B, K, 7, 7] int32
    x_gradient,  # *[B, K, t, t, C] contiguous
    rows,  # B * K * t * t
    count,  # K
    C,
    LARGEST: tl.constexpr,
    SIDE: tl.constexpr,  # t
    STRIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per (block of rows, block of channels). Reads the windows over a position, adds in their order."""
    P: tl.constexpr = SIDE // STRIDE
    m, c = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tile, y, x = m // (SIDE * SIDE), m // SIDE % SIDE, m % SIDE
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for tap in range(KERNEL * KERNEL):
        # Never negative, so that the remainder is that of a division rounding down.
        row = y + PADDING - tap // KERNEL + REACH * SIDE
        column = x + PADDING - tap % KERNEL + REACH * SIDE
        meets = (row % STRIDE == 0) & (column % STRIDE == 0) & (m < rows)
        met, there = _met(neighbours, tile, row // STRIDE - REACH * P, column // STRIDE - REACH * P, meets, count, P)
        mask = there[:, None] & (c < C)[None, :]
        from_ = met[:, None] * C + c[None, :]
        value = tl.load(gradient + from_, mask=mask, other=0.0).to(tl.float32)
        if LARGEST:
            total += tl.where(tl.load(chosen + from_, mask=mask, other=255).to(tl.int32) == tap, value, 0.0)
        else:
            total += value * tl.load(share + met, mask=there, other=0.0)[:, None]
    to = m.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(x_gradient + to, total.to(x_gradient.dtype.element_ty), mask=(m < rows)[:, None] & (c < C)[None, :])


BLOCK_M, BLOCK_C = 16, 64


def _grid(rows: int, channels: int) -> tuple[int, int]:
    return triton.cdiv(rows, BLOCK_M), triton.cdiv(channels, BLOCK_C)


def masked_max_pool(x: Tensor, neighbours: Tensor, window: tuple[int, int, int], out: Tensor, chosen: Tensor) -> None:
    """Fills out [B, K, P, P, C] and chosen, uint8 of that shape; window: k, s, padding. All contiguous."""
    count, side, channels = out.shape[1], out.shape[2], out.shape[4]
    if out.numel():
        rows = out.numel() // channels
        kernel, stride, padding = window
        _max_pool[_grid(rows, channels)](
            x, neighbours, out, chosen, rows, count, channels, side, stride, kernel, padding, BLOCK_M, BLOCK_C,
            num_warps=4,
        )  # fmt: skip


def masked_avg_pool(
    x: Tensor, neighbours: Tensor, window: tuple[int, int, int], visible: bool, out: Tensor, share: Tensor
) -> None:
    """Fills out [B, K, P, P, C] and share [B, K, P, P], what a tap weighs; window: k, s, padding. All contiguous."""
    count, side, channels = out.shape[1], out.shape[2], out.shape[4]
    if out.numel():
        rows = out.numel() // channels
        kernel, stride, padding = window
        _avg_pool[_grid(rows, channels)](
            x, neighbours, out, share, rows, count, channels, visible, side, stride, kernel, padding, BLOCK_M, BLOCK_C,
            num_warps=4,
        )  # fmt: skip


def masked_max_pool_backward(
    gradient: Tensor, chosen: Tensor, neighbours: Tensor, window: tuple[int, int, int], x_gradient: Tensor
) -> None:
    """Fills x_gradient [B, K, t, t, C]; window: k, s, padding. All contiguous."""
    _backward(gradient, chosen, chosen, neighbours, window, x_gradient, True)


def masked_avg_pool_backward(
    gradient: Tensor, share: Tensor, neighbours: Tensor, window: tuple[int, int, int], x_gradient: Tensor
) -> None:
    """Fills x_gradient [B, K, t, t, C]; window: k, s, padding. All contiguous."""
    _backward(gradient, share, share, neighbours, window, x_gradient, False)


def _backward(
    gradient: Tensor,
    chosen: Tensor,
    share: Tensor,
    neighbours: Tensor,
    window: tuple[int, int, int],
    x_gradient: Tensor,
    largest: bool,
) -> None:
    count, side, channels = x_gradient.shape[1], x_gradient.shape[2], x_gradient.shape[4]
    if x_gradient.numel():
        rows = x_gradient.numel() // channels
        kernel, stride, padding = window
        _pool_backward[_grid(rows, channels)](
            gradient, chosen, share, neighbours, x_gradient, rows, count, channels, largest, side, stride, kernel,
            padding, BLOCK_M, BLOCK_C, num_warps=4,
        )  # fmt: skip


def _configs(element: str, side: int, kernel: int, stride: int, padding: int) -> list[Config]:
    """side: t."""
    sizes = {"neighbours": "*i32", "rows": "i32", "count": "i32", "C": "i32"}
    window = {"STRIDE": stride, "KERNEL": kernel, "PADDING": padding, "BLOCK_M": BLOCK_M, "BLOCK_C": BLOCK_C}
    maps = {"x": f"*{element}", "out": f"*{element}"}
    back = {"gradient": f"*{element}", "x_gradient": f"*{element}", "chosen": "*u8", "share": "*fp32"}
    aligned, aligned_back = ("x", "out", "C"), ("gradient", "x_gradient", "C", "chosen", "share")
    forward, backward = {"P": side // stride, **window}, {"SIDE": side, **window}
    return [
        Config(_max_pool, {**maps, **sizes, "chosen": "*u8"}, forward, aligned=(*aligned, "chosen")),
        *(
            Config(_avg_pool, {**maps, **sizes, "share": "*fp32"}, {"VISIBLE": visible, **forward}, aligned=aligned)
            for visible in (True, False)
        ),
        *(
            Config(_pool_backward, {**back, **sizes}, {"LARGEST": largest, **backward}, aligned=aligned_back)
            for largest in (True, False)
        ),
    ]


AHEAD_OF_TIME = [*_configs("bf16", 16, 3, 2, 1), *_configs("fp32", 16, 3, 2, 1), *_configs("bf16", 8, 2, 2, 0)]
