"""Triton kernels around the two matrix products of the homologous contrastive loss; one program a row each.

Legend: S sequences, L positions, D width.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastmim.kernels.ahead_of_time import Config
from fastmim.ops.homologous_contrastive import NORM_EPS

EPS = tl.constexpr(NORM_EPS)
NEVER = tl.constexpr(3e38)  # a logarithm of a denominator that turns every exponential below it into 0


@triton.jit
def _normalise(
    tokens,  # *[S, L, D], strided
    unit,  # *[S, L, D] fp32
    inverse_norm,  # *[S, L] fp32
    stride_s, stride_l, stride_d,  # of tokens
    L, D,
    BLOCK: tl.constexpr,  # power of two >= D
):  # fmt: skip
    """One program per token. Reads D values, writes D."""
    row = tl.program_id(0).to(tl.int64)  # s * L + l; int64, because S * L * D may exceed 2**31
    d = tl.arange(0, BLOCK)
    at = tokens + row // L * stride_s + row % L * stride_l + d.to(tl.int64) * stride_d
    x = tl.load(at, mask=d < D, other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(tl.sum(x * x))
    inverse = tl.div_rn(1.0, tl.where(norm <= EPS, EPS, norm))
    tl.store(unit + row * D + d, x * inverse, mask=d < D)
    tl.store(inverse_norm + row, inverse)


@triton.jit
def _scores(
    row,  # *the products of one token with all
    owner,  # *the segments of its sequence
    position,  # its own place
    mine,  # its segment
    j,  # [BLOCK] int32 places
    scale,  # 1 / temperature
    L,
):
    """(scores with -inf at the position itself and beyond the sequence, True where another of the same image is)."""
    other = (j < L) & (j != position)
    x = tl.load(row + j, mask=other, other=0.0) * scale
    same = other & (tl.load(owner + j, mask=j < L, other=-1) == mine)
    return tl.where(other, x, float("-inf")), same


@triton.jit
def _rows(
    slope,  # *[S, L, L] fp32 products of unit tokens
    segments,  # *[S, L] int64
    rows,  # *[3, S, L] fp32: logarithm of the denominator, 1 / partners, loss of the position
    scale, L, count,  # count = S * L
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per position. Reads its L products (twice, the second time from the cache), writes 12 bytes."""
    index = tl.program_id(0).to(tl.int64)  # s * L + l; int64, because S * L * L may exceed 2**31
    position = (index % L).to(tl.int32)
    owner = segments + index // L * L
    mine = tl.load(owner + position)
    top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    attracted = tl.zeros([BLOCK], dtype=tl.float32)
    partners = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, L, BLOCK):
        x, same = _scores(slope + index * L, owner, position, mine, start + tl.arange(0, BLOCK), scale, L)
        top = tl.maximum(top, x)
        attracted += tl.where(same, x, 0.0)
        partners += same.to(tl.int32)
    highest = tl.max(top)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, L, BLOCK):
        x, same = _scores(slope + index * L, owner, position, mine, start + tl.arange(0, BLOCK), scale, L)
        total += tl.exp(x - highest)
    denominator = highest + tl.log(tl.sum(total))
    number = tl.sum(partners)
    pull = tl.where(number > 0, tl.div_rn(1.0, tl.maximum(number, 1).to(tl.float32)), 0.0)
    tl.store(rows + index, tl.where(number > 0, denominator, NEVER))
    tl.store(rows + count + index, pull)
    tl.store(rows + 2 * count + index, tl.where(number > 0, denominator - tl.sum(attracted) * pull, 0.0))


@triton.jit
def _slope(
    slope,  # *[S, L, L] fp32, products in, slopes out
    segments,  # *[S, L] int64
    rows,  # *[3, S, L] fp32
    scale, factor, L, count,  # factor = 1 / (S * L * temperature)
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per position: p(l, j) + p(j, l) - 2 / partners where j is of the same image. Reads and writes L."""
    index = tl.program_id(0).to(tl.int64)
    position = (index % L).to(tl.int32)
    first = index // L * L
    mine = tl.load(segments + index)
    own = tl.load(rows + index)
    pull = 2.0 * tl.load(rows + count + index)
    for start in range(0, L, BLOCK):
        j = start + tl.arange(0, BLOCK)
        x, same = _scores(slope + index * L, segments + first, position, mine, j, scale, L)
        theirs = tl.load(rows + first + j, mask=j < L, other=0.0)
        value = tl.exp(x - own) + tl.exp(x - theirs) - tl.where(same, pull, 0.0)
        tl.store(slope + index * L + j, value * factor, mask=j < L)


@triton.jit
def _finish(
    losses,  # *[S * L] fp32
    loss,  # *scalar fp32
    count,
    BLOCK: tl.constexpr,
):
    """One program: sums in one order, so two runs agree to the bit."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(losses + index, mask=index < count, other=0.0)
    tl.store(loss, tl.div_rn(tl.sum(total), tl.maximum(count, 1).to(tl.float32)))


@triton.jit
def _normalise_backward(
    grad_loss,  # *scalar fp32
    grad_unit,  # *[S, L, D] fp32
    unit,  # *[S, L, D] fp32
    inverse_norm,  # *[S, L] fp32
    gradient,  # *[S, L, D] contiguous
    D,
    BLOCK: tl.constexpr,  # power of two >= D
):
    """One program per token. Reads 2 D values, writes D."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    grad = tl.load(grad_unit + row * D + d, mask=d < D, other=0.0)
    x = tl.load(unit + row * D + d, mask=d < D, other=0.0)
    inverse = tl.load(inverse_norm + row)
    # A token shorter than the bound was scaled by a constant: nothing to project off.
    along = tl.where(inverse < 1.0 / EPS, tl.sum(x * grad), 0.0)
    result = (grad - along * x) * (inverse * tl.load(grad_loss))
    tl.store(gradient + row * D + d, result.to(gradient.dtype.element_ty), mask=d < D)


ROW_BLOCK, SUM_BLOCK = 256, 4096


def _width(width: int) -> tuple[int, int]:
    """(BLOCK, num_warps) of kernels that hold one token."""
    block = max(triton.next_power_of_2(width), 64)
    return block, 4 if block <= 2048 else 8


def normalise(tokens: Tensor, unit: Tensor, inverse_norm: Tensor) -> None:
    """Fills unit [S, L, D] and inverse_norm [S, L]."""
    block, warps = _width(tokens.shape[2])
    if inverse_norm.numel():
        _normalise[(inverse_norm.numel(),)](
            tokens, unit, inverse_norm, *tokens.stride(), *tokens.shape[1:], block, num_warps=warps
        )


def contrast(slope: Tensor, segments: Tensor, temperature: float, rows: Tensor, loss: Tensor) -> None:
    """Turns the products in slope [S, L, L] into slopes and fills rows [3, S, L] and loss []."""
    count, length = segments.numel(), segments.shape[1]
    if count:
        scale = 1.0 / temperature
        _rows[(count,)](slope, segments, rows, scale, length, count, ROW_BLOCK, num_warps=4)
        _slope[(count,)](slope, segments, rows, scale, scale / count, length, count, ROW_BLOCK, num_warps=4)
    _finish[(1,)](rows[2], loss, count, SUM_BLOCK, num_warps=8)


def normalise_backward(
    grad_loss: Tensor, grad_unit: Tensor, unit: Tensor, inverse_norm: Tensor, gradient: Tensor
) -> None:
    """Fills gradient [S, L, D], contiguous."""
    width = gradient.shape[2]
    block, warps = _width(width)
    if inverse_norm.numel():
        _normalise_backward[(inverse_norm.numel(),)](
            grad_loss, grad_unit, unit, inverse_norm, gradient, width, block, num_warps=warps
        )


def _configs(element: str, width: int) -> list[Config]:
    """Both kernels that hold one token."""
    block, warps = _width(width)
    strides = {"stride_s": "i32", "stride_l": "i32", "stride_d": "i32"}
    signature = {"tokens": f"*{element}", "unit": "*fp32", "inverse_norm": "*fp32", **strides, "L": "i32", "D": "i32"}
    back = {"grad_loss": "*fp32", "grad_unit": "*fp32", "unit": "*fp32", "inverse_norm": "*fp32"}
    back |= {"gradient": f"*{element}", "D": "i32"}
    return [
        Config(_normalise, signature, {"BLOCK": block}, num_warps=warps, aligned=("tokens", "unit")),
        Config(_normalise_backward, back, {"BLOCK": block}, num_warps=warps, aligned=("grad_unit", "unit", "gradient")),
    ]


_ROWS = {"slope": "*fp32", "segments": "*i64", "rows": "*fp32", "scale": "fp32", "L": "i32", "count": "i32"}
AHEAD_OF_TIME = [
    Config(_rows, _ROWS, {"BLOCK": ROW_BLOCK}, aligned=("slope", "segments", "rows")),
    Config(_slope, {**_ROWS, "factor": "fp32"}, {"BLOCK": ROW_BLOCK}, aligned=("slope", "segments", "rows")),
    Config(_finish, {"losses": "*fp32", "loss": "*fp32", "count": "i32"}, {"BLOCK": SUM_BLOCK}, num_warps=8),
    *(c for element in ("fp32", "bf16", "fp16") for width in (384, 768, 1280) for c in _configs(element, width)),
    *_configs("bf16", 4096),
]
