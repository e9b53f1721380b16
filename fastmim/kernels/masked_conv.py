"""Triton kernels for k x k convolution over tiles: an implicit matrix product over the neighbour table.

Legend: B batch, K visible cells, t tile side, s stride, P = t / s, C input and O output channels, k kernel side.
Rows are positions (tile, y, x). A row meets, at each tap, one row of the other tensor or none.

The input gradient of a convolution of stride s falls apart into s * s convolutions: positions of equal (y % s, x % s)
meet the same taps. So forward (one such class) and input gradient are one kernel, and no tap is multiplied in vain.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim.kernels.ahead_of_time import Config

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # bf16 products are wrong there: operands become fp32
REACH, WINDOW = tl.constexpr(3), tl.constexpr(7)  # of the neighbour table


@triton.jit
def _source(
    neighbours,  # *[B, K, 7, 7] int32
    tile, y, x,  # int32 position among all tiles' positions, of one class
    ky, kx,  # int32 taps; broadcast with the positions
    inside,  # whether the position and the tap exist
    count,  # K
    shift_y, shift_x,  # transposed: (y % s + k // 2 - ky) / s = shift - i at tap number i; forward: not used
    RADIUS: tl.constexpr,
    SIDE: tl.constexpr,  # of the tiles met
    STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(row met, int64; whether there is one). ky and kx count the taps of a class: in steps of the stride."""
    if TRANSPOSED:
        row, column = y + shift_y - ky, x + shift_x - kx
    else:
        row, column = y * STRIDE + ky - RADIUS, x * STRIDE + kx - RADIUS
    up = (row + REACH * SIDE) // SIDE  # cells away, plus the reach: never negative, so rounding down is truncation
    left = (column + REACH * SIDE) // SIDE
    near = tl.load(neighbours + tile.to(tl.int64) * WINDOW * WINDOW + up * WINDOW + left, mask=inside, other=-1)
    there = (tile - tile % count + near).to(tl.int64)  # int64, because B * K * t * t * C may exceed 2**31
    return (there * SIDE + row - (up - REACH) * SIDE) * SIDE + column - (left - REACH) * SIDE, near >= 0


@triton.jit
def _position(m, P: tl.constexpr):
    """Tile, y and x of row m of a class."""
    return m // (P * P), m // P % P, m % P


@triton.jit
def _class(index, RADIUS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr):
    """Along one axis, of the class of positions y % s = index: first tap, number of taps, shift at tap number 0."""
    first = (index + RADIUS) % STRIDE
    return first, (KERNEL - first + STRIDE - 1) // STRIDE, (index + RADIUS - first) // STRIDE


@triton.jit
def _dense(
    source,  # *[B, K, SIDE, SIDE, C] contiguous: x, or the gradient of out
    weight,  # *[k, k, C, O] contiguous
    bias,  # *[O]
    neighbours,  # *[B, K, 7, 7] int32
    out,  # *[B, K, t', t', O] contiguous: out, or the gradient of x
    rows,  # B * K * P * P, of one class
    count,  # K
    C, OUT,  # C, O
    BIAS: tl.constexpr,
    P: tl.constexpr,
    STRIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MERGED: tl.constexpr,  # few channels: taps and channels are one axis of the product
    PRECISION: tl.constexpr,  # of fp32 products
    UPCAST: tl.constexpr,  # operands to fp32
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One program per (block of rows, block of outputs, class). Multiplies taps * C * BLOCK_M * BLOCK_O; the rows met
    are read once a tap, through the second-level cache."""
    RADIUS: tl.constexpr = KERNEL // 2
    SIDE: tl.constexpr = P if TRANSPOSED else P * STRIDE
    blocks_o = tl.cdiv(OUT, BLOCK_O)
    m = tl.program_id(0) // blocks_o * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(0) % blocks_o * BLOCK_O + tl.arange(0, BLOCK_O)
    class_y, class_x = tl.program_id(1) // STRIDE, tl.program_id(1) % STRIDE
    first_y, first_x, shift_y, shift_x, taps_y, taps_x = 0, 0, 0, 0, KERNEL, KERNEL
    if TRANSPOSED:
        first_y, taps_y, shift_y = _class(class_y, RADIUS, KERNEL, STRIDE)
        first_x, taps_x, shift_x = _class(class_x, RADIUS, KERNEL, STRIDE)
    step: tl.constexpr = STRIDE if TRANSPOSED else 1  # between the taps of a class
    inside = m < rows
    tile, y, x = _position(m, P)
    blocks_c = tl.cdiv(taps_y * taps_x * C, BLOCK_C) if MERGED else tl.cdiv(C, BLOCK_C)
    sums = tl.zeros([BLOCK_M, BLOCK_O], dtype=tl.float32)
    for i in range(0, blocks_c if MERGED else taps_y * taps_x * blocks_c):
        if MERGED:
            r = i * BLOCK_C + tl.arange(0, BLOCK_C)
            c, tap = r % C, r // C
            known = tap < taps_y * taps_x
            ky, kx = tap // taps_x, tap % taps_x
            from_row, there = _source(
                neighbours, tile[:, None], y[:, None], x[:, None], ky[None, :], kx[None, :],
                inside[:, None] & known[None, :], count, shift_y, shift_x, RADIUS, SIDE, STRIDE, TRANSPOSED,
            )  # fmt: skip
            a = tl.load(source + from_row * C + c[None, :], mask=there, other=0.0)
        else:
            c, tap = i % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C), i // blocks_c
            known = c < C
            ky, kx = tap // taps_x, tap % taps_x
            from_row, there = _source(
                neighbours, tile, y, x, ky, kx, inside, count, shift_y, shift_x, RADIUS, SIDE, STRIDE, TRANSPOSED
            )  # fmt: skip
            a = tl.load(source + (from_row * C)[:, None] + c[None, :], mask=there[:, None] & known[None, :], other=0.0)
        at = ((first_y + step * ky) * KERNEL + first_x + step * kx) * C + c
        w = tl.load(weight + at[:, None] * OUT + o[None, :], mask=known[:, None] & (o < OUT)[None, :], other=0.0)
        if UPCAST:
            a, w = a.to(tl.float32), w.to(tl.float32)
        sums = tl.dot(a, w, sums, input_precision=PRECISION)
    if BIAS:
        sums += tl.load(bias + o, mask=o < OUT, other=0.0).to(tl.float32)[None, :]
    to_row = tile.to(tl.int64) * P * P + y * P + x
    if TRANSPOSED:
        to_row = (tile.to(tl.int64) * (P * STRIDE) + y * STRIDE + class_y) * (P * STRIDE) + x * STRIDE + class_x
    to = out + to_row[:, None] * OUT + o[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside[:, None] & (o < OUT)[None, :])


@triton.jit
def _dense_weight_gradient(
    gradient,  # *[B, K, P, P, O] contiguous
    x,  # *[B, K, t, t, C] contiguous
    neighbours,  # *[B, K, 7, 7] int32
    partial,  # *[parts, k, k, C, O] fp32
    rows,  # B * K * P * P
    rows_of_part,  # a multiple of BLOCK_M
    count,  # K
    C, OUT,  # C, O
    P: tl.constexpr,
    STRIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    MERGED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """One program per (block of input and output channels, tap, part of the rows). Adds up its rows in their order."""
    TAPS: tl.constexpr = KERNEL * KERNEL
    blocks_o = tl.cdiv(OUT, BLOCK_O)
    o = tl.program_id(0) % blocks_o * BLOCK_O + tl.arange(0, BLOCK_O)
    r = tl.program_id(0) // blocks_o * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(2)
    if MERGED:
        c, tap, known = r % C, r // C, r < TAPS * C
    else:
        c, tap, known = r, tl.program_id(1), r < C
    ky, kx = tap // KERNEL, tap % KERNEL
    sums = tl.zeros([BLOCK_C, BLOCK_O], dtype=tl.float32)
    for start in range(part * rows_of_part, tl.minimum((part + 1) * rows_of_part, rows), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = m < rows
        tile, row, column = _position(m, P)
        if MERGED:
            from_row, there = _source(
                neighbours, tile[:, None], row[:, None], column[:, None], ky[None, :], kx[None, :],
                inside[:, None] & known[None, :], count, 0, 0, KERNEL // 2, P * STRIDE, STRIDE, False,
            )  # fmt: skip
            a = tl.load(x + from_row * C + c[None, :], mask=there, other=0.0)
        else:
            from_row, there = _source(
                neighbours, tile, row, column, ky, kx, inside, count, 0, 0, KERNEL // 2, P * STRIDE, STRIDE, False
            )  # fmt: skip
            a = tl.load(x + (from_row * C)[:, None] + c[None, :], mask=there[:, None] & known[None, :], other=0.0)
        at = gradient + (m.to(tl.int64) * OUT)[:, None] + o[None, :]
        g = tl.load(at, mask=inside[:, None] & (o < OUT)[None, :], other=0.0)
        if UPCAST:
            a, g = a.to(tl.float32), g.to(tl.float32)
        sums = tl.dot(tl.trans(a), g, sums, input_precision=PRECISION)
    first = part.to(tl.int64) * TAPS * C
    if not MERGED:
        first += tap * C
    to = partial + (first + r)[:, None] * OUT + o[None, :]
    tl.store(to, sums, mask=known[:, None] & (o < OUT)[None, :])


@triton.jit
def _depthwise(
    source,  # *[B, K, SIDE, SIDE, C] contiguous: x, or the gradient of out
    weight,  # *[k, k, C] fp32
    bias,  # *[C]
    neighbours,  # *[B, K, 7, 7] int32
    out,  # *[B, K, t', t', C] contiguous: out, or the gradient of x
    rows,  # B * K * P * P, of one class
    count,  # K
    C,
    BIAS: tl.constexpr,
    P: tl.constexpr,
    STRIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per (block of rows, block of channels, class). A row met is read once a tap, from the first-level
    cache but for the first time; masked ones are not."""
    RADIUS: tl.constexpr = KERNEL // 2
    SIDE: tl.constexpr = P if TRANSPOSED else P * STRIDE
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    class_y, class_x = tl.program_id(2) // STRIDE, tl.program_id(2) % STRIDE
    first_y, first_x, shift_y, shift_x, taps_y, taps_x = 0, 0, 0, 0, KERNEL, KERNEL
    if TRANSPOSED:
        first_y, taps_y, shift_y = _class(class_y, RADIUS, KERNEL, STRIDE)
        first_x, taps_x, shift_x = _class(class_x, RADIUS, KERNEL, STRIDE)
    step: tl.constexpr = STRIDE if TRANSPOSED else 1
    inside = m < rows
    tile, y, x = _position(m, P)
    sums = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    if BIAS:
        sums += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    for tap in range(0, taps_y * taps_x):
        ky, kx = tap // taps_x, tap % taps_x
        from_row, there = _source(
            neighbours, tile, y, x, ky, kx, inside, count, shift_y, shift_x, RADIUS, SIDE, STRIDE, TRANSPOSED
        )  # fmt: skip
        w = tl.load(weight + ((first_y + step * ky) * KERNEL + first_x + step * kx) * C + c, mask=c < C, other=0.0)
        a = tl.load(source + (from_row * C)[:, None] + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0.0)
        sums += a.to(tl.float32) * w[None, :]
    to_row = tile.to(tl.int64) * P * P + y * P + x
    if TRANSPOSED:
        to_row = (tile.to(tl.int64) * (P * STRIDE) + y * STRIDE + class_y) * (P * STRIDE) + x * STRIDE + class_x
    to = out + (to_row * C)[:, None] + c[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])


@triton.jit
def _depthwise_weight_gradient(
    gradient,  # *[B, K, P, P, C] contiguous
    x,  # *[B, K, t, t, C] contiguous
    neighbours,  # *[B, K, 7, 7] int32
    partial,  # *[parts, k, k, C] fp32
    rows,  # B * K * P * P
    rows_of_part,  # a multiple of BLOCK_M
    count,  # K
    C,
    P: tl.constexpr,
    STRIDE: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program per (tap, block of channels, part of the rows). Adds up its rows in a fixed order."""
    tap, part = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros([BLOCK_M, BLOCK_C], dtype=tl.float32)
    for start in range(part * rows_of_part, tl.minimum((part + 1) * rows_of_part, rows), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        tile, y, column = _position(m, P)
        from_row, there = _source(
            neighbours, tile, y, column, tap // KERNEL, tap % KERNEL, m < rows, count, 0, 0, KERNEL // 2, P * STRIDE,
            STRIDE, False,
        )  # fmt: skip
        mask = there[:, None] & (c < C)[None, :]
        a = tl.load(x + (from_row * C)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gradient + (m.to(tl.int64) * C)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += a * g
    to = partial + (part.to(tl.int64) * KERNEL * KERNEL + tap) * C + c
    tl.store(to, tl.sum(sums, axis=0), mask=c < C)


FEW_CHANNELS = 16  # a product's inner axis is at least that long: with fewer channels it is merged with the taps
PROGRAMS = 512  # wanted: a few for every multiprocessor
STAGES = 5  # two of them are for the table, whose entries are the addresses of the rows
REGISTERS = 240  # a thread may have; see _registers


def _dense_blocks(rows: int, inner: int, outputs: int, precise: bool) -> tuple[dict[str, int], int]:
    """(blocks, warps) of a product [rows, inner] x [inner, outputs]. Not tuned on a device: square enough to be bound
    by the multipliers, small enough for two programs a multiprocessor."""
    block_o = 128 if outputs > 64 and not precise else 64 if outputs > 32 else 32
    block_m = 128 if not precise and triton.cdiv(rows, 128) * triton.cdiv(outputs, block_o) >= PROGRAMS // 2 else 64
    block_c = 32 if precise or inner <= 32 else 64
    block_m = 512 if INTERPRETED else block_m
    return {"BLOCK_M": block_m, "BLOCK_C": block_c, "BLOCK_O": block_o}, _warps(block_m, block_o, precise)


def _dense_gradient_blocks(channels: int, outputs: int, precise: bool) -> tuple[dict[str, int], int]:
    block_c, block_o = (128 if n > 64 and not precise else 64 if n > 32 else 32 for n in (channels, outputs))
    return {"BLOCK_M": 512 if INTERPRETED else 32, "BLOCK_C": block_c, "BLOCK_O": block_o}, _warps(
        block_c, block_o, precise
    )


def _warps(rows: int, columns: int, precise: bool) -> int:
    """Enough that sums and the addresses of rows stay in registers on every target."""
    return 8 if rows * columns >= 8192 or precise else 4


def _depthwise_blocks(channels: int, interpreted: bool = INTERPRETED) -> dict[str, int]:
    if interpreted:  # it likes few programs, and no idle lanes
        return {"BLOCK_M": 512, "BLOCK_C": min(64, triton.next_power_of_2(channels))}
    return {"BLOCK_M": 32, "BLOCK_C": 64}


def _registers(element_is_fp32: bool, precision: str) -> int | None:
    """How many a thread may have. Left to itself ptxas spills a few bytes to fit one more block; given room where
    products are fp32 multiply-adds, it unrolls them until that spills."""
    return None if element_is_fp32 and precision == "ieee" else REGISTERS


def _precision(x: Tensor) -> str:
    """Of fp32 products: what PyTorch's own convolutions are told to use on this device."""
    return "tf32" if x.is_cuda and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def _parts(rows: int, programs: int, block: int) -> tuple[int, int]:
    """(parts, rows of a part): a function of the shape alone."""
    parts = max(1, min(triton.cdiv(PROGRAMS, programs), triton.cdiv(rows, 4 * block)))
    rows_of_part = triton.cdiv(triton.cdiv(rows, parts), block) * block
    return max(1, triton.cdiv(rows, rows_of_part)) if rows_of_part else 1, max(rows_of_part, block)


def _product(source: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, stride: int, out: Tensor,
             transposed: bool) -> None:  # fmt: skip
    """weight: [k, k, C, O] in the dtype of source."""
    k, _, channels, outputs = weight.shape
    p = source.shape[2] if transposed else out.shape[2]
    rows = neighbours.shape[0] * neighbours.shape[1] * p * p
    if rows == 0:
        return
    merged, precise, precision = channels < FEW_CHANNELS, source.dtype == torch.float32, _precision(source)
    blocks, warps = _dense_blocks(rows, 9 * channels if merged else channels, outputs, precise)
    grid = (
        triton.cdiv(rows, blocks["BLOCK_M"]) * triton.cdiv(outputs, blocks["BLOCK_O"]),
        stride**2 if transposed else 1,
    )
    _dense[grid](
        source, weight, weight if bias is None else bias, neighbours, out, rows, neighbours.shape[1], channels, outputs,
        bias is not None, p, stride, k, transposed, merged, precision, INTERPRETED, **blocks,
        num_warps=warps, num_stages=STAGES, maxnreg=_registers(precise, precision), enable_fp_fusion=True,
    )  # fmt: skip


def masked_dense(x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, stride: int, out: Tensor) -> None:
    """Fills out [B, K, t / s, t / s, O] from x [B, K, t, t, C] and weight [O, C, k, k]."""
    _product(x, weight.permute(2, 3, 1, 0).to(x.dtype).contiguous(), bias, neighbours, stride, out, False)


def masked_dense_input_gradient(
    gradient: Tensor, weight: Tensor, neighbours: Tensor, stride: int, x_gradient: Tensor
) -> None:
    """Fills x_gradient [B, K, t, t, C] from gradient [B, K, t / s, t / s, O]."""
    packed = weight.permute(2, 3, 0, 1).to(gradient.dtype).contiguous()
    _product(gradient, packed, None, neighbours, stride, x_gradient, True)


def masked_dense_weight_gradient(
    gradient: Tensor, x: Tensor, neighbours: Tensor, stride: int, weight_gradient: Tensor, bias_gradient: Tensor | None
) -> None:
    """Fills weight_gradient [O, C, k, k] and bias_gradient [O]."""
    outputs, channels, k, _ = weight_gradient.shape
    p, taps = gradient.shape[2], k * k
    rows = neighbours.shape[0] * neighbours.shape[1] * p * p
    merged, precise, precision = channels < FEW_CHANNELS, x.dtype == torch.float32, _precision(x)
    inner = taps * channels if merged else channels
    blocks, warps = _dense_gradient_blocks(inner, outputs, precise)
    products = triton.cdiv(inner, blocks["BLOCK_C"]) * triton.cdiv(outputs, blocks["BLOCK_O"])
    grid_taps = 1 if merged else taps
    parts, rows_of_part = _parts(rows, products * grid_taps, blocks["BLOCK_M"])
    partial = x.new_empty((parts, k, k, channels, outputs), dtype=torch.float32)
    _dense_weight_gradient[(products, grid_taps, parts)](
        gradient, x, neighbours, partial, rows, rows_of_part, neighbours.shape[1], channels, outputs,
        p, stride, k, merged, precision, INTERPRETED, **blocks,
        num_warps=warps, num_stages=STAGES, maxnreg=_registers(precise, precision), enable_fp_fusion=True,
    )  # fmt: skip
    weight_gradient.copy_(partial.sum(0).permute(3, 2, 0, 1))
    _bias_gradient(gradient, bias_gradient)


def _bias_gradient(gradient: Tensor, bias_gradient: Tensor | None) -> None:
    if bias_gradient is not None:
        bias_gradient.copy_(gradient.flatten(0, -2).sum(0, dtype=torch.float32))


def _rows(source: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, stride: int, out: Tensor,
          transposed: bool) -> None:  # fmt: skip
    channels, k = weight.shape[0], weight.shape[-1]
    p = source.shape[2] if transposed else out.shape[2]
    rows = neighbours.shape[0] * neighbours.shape[1] * p * p
    if rows == 0:
        return
    packed = weight.float().reshape(channels, k * k).t().contiguous()
    blocks = _depthwise_blocks(channels)
    grid = (triton.cdiv(rows, blocks["BLOCK_M"]), triton.cdiv(channels, blocks["BLOCK_C"]))
    _depthwise[(*grid, stride**2 if transposed else 1)](
        source, packed, packed if bias is None else bias, neighbours, out, rows, neighbours.shape[1], channels,
        bias is not None, p, stride, k, transposed, **blocks,
        num_warps=4, num_stages=3, maxnreg=REGISTERS, enable_fp_fusion=True,
    )  # fmt: skip


def masked_depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, stride: int, out: Tensor
) -> None:
    """Fills out [B, K, t / s, t / s, C] from x [B, K, t, t, C] and weight [C, 1, k, k]."""
    _rows(x, weight, bias, neighbours, stride, out, False)


def masked_depthwise_input_gradient(
    gradient: Tensor, weight: Tensor, neighbours: Tensor, stride: int, x_gradient: Tensor
) -> None:
    """Fills x_gradient [B, K, t, t, C] from gradient [B, K, t / s, t / s, C]."""
    _rows(gradient, weight, None, neighbours, stride, x_gradient, True)


def masked_depthwise_weight_gradient(
    gradient: Tensor, x: Tensor, neighbours: Tensor, stride: int, weight_gradient: Tensor, bias_gradient: Tensor | None
) -> None:
    """Fills weight_gradient [C, 1, k, k] and bias_gradient [C]."""
    channels, k, p = x.shape[4], weight_gradient.shape[-1], gradient.shape[2]
    rows = neighbours.shape[0] * neighbours.shape[1] * p * p
    blocks = _depthwise_blocks(channels)
    blocks_c = triton.cdiv(channels, blocks["BLOCK_C"])
    blocks["BLOCK_M"] = min(blocks["BLOCK_M"], 128)  # the interpreter adds its rows one after the other
    parts, rows_of_part = _parts(rows, blocks_c * k * k, blocks["BLOCK_M"])
    partial = x.new_empty((parts, k * k, channels), dtype=torch.float32)
    _depthwise_weight_gradient[(k * k, blocks_c, parts)](
        gradient, x, neighbours, partial, rows, rows_of_part, neighbours.shape[1], channels, p, stride, k,
        **blocks, num_warps=4, num_stages=3, maxnreg=REGISTERS, enable_fp_fusion=True,
    )  # fmt: skip
    weight_gradient.copy_(partial.sum(0).t().reshape(weight_gradient.shape))
    _bias_gradient(gradient, bias_gradient)


def _dense_configs(
    element: str, channels: int, outputs: int, p: int, stride: int, k: int, rows: int, precision: str = "ieee"
) -> list[Config]:
    """Forward, input gradient and weight gradient of one convolution."""
    precise, merged = element == "fp32", channels < FEW_CHANNELS
    tensors = {"neighbours": "*i32", "rows": "i32", "count": "i32", "C": "i32", "OUT": "i32"}
    constants = {"P": p, "STRIDE": stride, "KERNEL": k, "PRECISION": precision, "UPCAST": False}
    registers = _registers(precise, precision)
    configs = []
    for transposed, inner, width in ((False, channels, outputs), (True, outputs, channels)):
        few = inner < FEW_CHANNELS
        blocks, warps = _dense_blocks(rows, 9 * inner if few else inner, width, precise)
        pointers = dict.fromkeys(("source", "weight", "bias", "out"), f"*{element}")
        aligned = ("source", "weight", "bias", "out", "neighbours")
        aligned += (() if inner % 16 else ("C",)) + (() if width % 16 else ("OUT",))
        more = {"BIAS": not transposed, "TRANSPOSED": transposed, "MERGED": few, **blocks}
        configs.append(
            Config(_dense, {**pointers, **tensors}, {**constants, **more}, warps, STAGES, aligned, registers)
        )
    blocks, warps = _dense_gradient_blocks(k * k * channels if merged else channels, outputs, precise)
    pointers = {"gradient": f"*{element}", "x": f"*{element}", "partial": "*fp32", "rows_of_part": "i32"}
    aligned = ("gradient", "x", "partial", "neighbours", "rows_of_part")
    aligned += (() if channels % 16 else ("C",)) + (() if outputs % 16 else ("OUT",))
    constants |= {"MERGED": merged, **blocks}
    configs.append(
        Config(_dense_weight_gradient, {**pointers, **tensors}, constants, warps, STAGES, aligned, registers)
    )
    return configs


def _depthwise_configs(element: str, p: int, stride: int, k: int) -> list[Config]:
    tensors = {"neighbours": "*i32", "rows": "i32", "count": "i32", "C": "i32"}
    constants = {"P": p, "STRIDE": stride, "KERNEL": k, **_depthwise_blocks(64, interpreted=False)}
    pointers = {"source": f"*{element}", "weight": "*fp32", "bias": "*fp32", "out": f"*{element}"}
    back = {"gradient": f"*{element}", "x": f"*{element}", "partial": "*fp32", "rows_of_part": "i32"}
    configs = []
    for transposed in (False, True):
        more = {"BIAS": not transposed, "TRANSPOSED": transposed}
        aligned = (*pointers, "neighbours", "C")
        configs.append(Config(_depthwise, {**pointers, **tensors}, {**constants, **more}, 4, 3, aligned, REGISTERS))
    aligned = (*back, "neighbours", "C")
    return [*configs, Config(_depthwise_weight_gradient, {**back, **tensors}, constants, 4, 3, aligned, REGISTERS)]


AHEAD_OF_TIME = [
    *_dense_configs("bf16", 64, 64, 8, 1, 3, 1 << 17),  # ResNet-50's four stages: sides 8, 4, 2, 1
    *_dense_configs("bf16", 128, 128, 4, 1, 3, 1 << 15),
    *_dense_configs("bf16", 256, 256, 2, 1, 3, 1 << 13),
    *_dense_configs("fp16", 512, 512, 1, 1, 3, 1 << 11),
    *_dense_configs("fp32", 64, 64, 8, 1, 3, 1 << 17),
    *_dense_configs("fp32", 512, 512, 1, 1, 3, 1 << 11, "tf32"),
    *_dense_configs("bf16", 128, 128, 4, 2, 3, 1 << 15),  # downsampling
    *_dense_configs("bf16", 3, 64, 16, 2, 7, 1 << 19),  # the stem
    *_dense_configs("fp32", 3, 40, 16, 2, 7, 1 << 15),
    *_depthwise_configs("bf16", 8, 1, 7),
    *_depthwise_configs("fp32", 2, 1, 7),
    *_depthwise_configs("fp16", 4, 2, 3),
]
