"""Triton kernels for short attention that reads and writes packed tensors through their strides.

Legend: B batch, H heads, Nq queries, Nk keys, D head width, DP the power of two that holds D.

A program belongs to one (image, head). Up to 128 keys lie in one tile: no rescaling forward, and a backward program
sees every key of its head, so it finishes the gradients of query, key and value alone. More keys are met in a loop;
backward, one launch holds programs for blocks of keys (their k and v gradients) and for blocks of queries (theirs).
Nothing is added up by atomics, so two runs agree to the bit. The gradient of a bias is in attention_bias_gradient.py.

Widths that are no power of two (40, 48, 80, 96) are padded in registers only: masked lanes are neither read nor
written, and the matrix products that they waste are a few per cent of operations that wait for memory.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim.kernels.ahead_of_time import Config

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # bf16 products are wrong there: operands become fp32
NOTHING = tl.constexpr(float("-inf"))  # score of a key that does not count


@triton.jit
def read_rows(
    start,  # pointer to [.., D] of one image and head
    n,  # int32 positions
    stride,  # between positions
    inside,  # bool, as n
    D: tl.constexpr,
    DP: tl.constexpr,
    UPCAST: tl.constexpr,  # to fp32
):
    """[len(n), DP], zeros outside."""
    d = tl.arange(0, DP)
    at = start + n[:, None] * stride + d[None, :]  # int32 within an image and head, see _near
    rows = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    return rows.to(tl.float32) if UPCAST else rows


@triton.jit
def _write_rows(start, n, stride, inside, rows, D: tl.constexpr, DP: tl.constexpr):
    """Stores [len(n), DP] where inside, in the precision of the destination."""
    d = tl.arange(0, DP)
    at = start + n[:, None] * stride + d[None, :]
    tl.store(at, rows.to(start.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def read_keys(
    n,  # int32 positions
    count,  # *[Nk] of one image; only with COUNT
    mask,  # *[Nk] int8 of one image, 1 = may be attended to; only with MASK
    Nk,
    COUNT: tl.constexpr,
    MASK: tl.constexpr,
):
    """(whether a key counts, what is added to its scores). Rows of keys that do not count are never read."""
    inside = n < Nk
    if MASK:
        inside = inside & (tl.load(mask + n, mask=inside, other=0) != 0)
    more = tl.zeros_like(n).to(tl.float32)
    if COUNT:
        more = tl.load(count + n, mask=inside, other=0.0).to(tl.float32)
    return inside, tl.where(inside, more, NOTHING)


@triton.jit
def add_bias(
    scores,  # fp32 [BLOCK_M, BLOCK_N], or transposed
    m, n,  # int32 positions, shaped to be broadcast
    bias,  # *[Nq, Nk] of one head
    bias_m, bias_n,  # its strides
    Nq, Nk,
):  # fmt: skip
    return scores + tl.load(bias + m * bias_m + n * bias_n, mask=(m < Nq) & (n < Nk), other=0.0).to(tl.float32)


@triton.jit
def _forward(
    q,  # *[B, Nq, H, D], strided, D contiguous
    k,  # *[B, Nk, H, D], strided
    v,  # *[B, Nk, H, D], strided
    bias,  # *[(B,) H, Nq, Nk], strided
    count,  # *[B, Nk] log of how many keys a key stands for
    mask,  # *[B, Nk] int8, 1 = may be attended to
    out,  # *[B, Nq, H, D], strided
    softmax,  # *[2, B, H, Nq] fp32, largest score (+inf where no key counts) and 1 / sum of exponentials (0 there)
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, out_b, out_n, out_h,  # strides
    bias_b, bias_h, bias_m, bias_n,  # strides; bias_b is 0 where the batch shares a bias
    H, Nq, Nk, rows, scale,  # rows: B * H * Nq
    D: tl.constexpr,
    DP: tl.constexpr,
    ONE_TILE: tl.constexpr,  # Nk <= BLOCK_N
    BIAS: tl.constexpr,
    COUNT: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per (image, head, block of queries). Reads its queries and all keys and values once."""
    blocks = tl.cdiv(Nq, BLOCK_M)
    head = tl.program_id(0) // blocks
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)  # int64, because tensors may exceed 2**31 elements
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    bias += b * bias_b + h * bias_h
    count += b * Nk
    mask += b * Nk
    queries = read_rows(q + b * q_b + h * q_h, m, q_n, m < Nq, D, DP, UPCAST)
    n = tl.arange(0, BLOCK_N)
    if ONE_TILE:
        inside, more = read_keys(n, count, mask, Nk, COUNT, MASK)
        keys = read_rows(k, n, k_n, inside, D, DP, UPCAST)
        values = read_rows(v, n, v_n, inside, D, DP, UPCAST)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale + more[None, :]
        if BIAS:
            scores = add_bias(scores, m[:, None], n[None, :], bias, bias_m, bias_n, Nq, Nk)
        top = tl.max(scores, 1)
        top = tl.where(top == NOTHING, 0.0, top)
        p = tl.exp(scores - top[:, None])
        total = tl.sum(p, 1)
        sums = tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
    else:
        top = tl.full([BLOCK_M], NOTHING, tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        sums = tl.zeros([BLOCK_M, DP], dtype=tl.float32)
        for start in range(0, Nk, BLOCK_N):
            inside, more = read_keys(start + n, count, mask, Nk, COUNT, MASK)
            keys = read_rows(k, start + n, k_n, inside, D, DP, UPCAST)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale + more[None, :]
            if BIAS:
                scores = add_bias(scores, m[:, None], start + n[None, :], bias, bias_m, bias_n, Nq, Nk)
            higher = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(higher == NOTHING, 0.0, higher)
            p = tl.exp(scores - base[:, None])
            keep = tl.exp(top - base)
            total = total * keep + tl.sum(p, 1)
            values = read_rows(v, start + n, v_n, inside, D, DP, UPCAST)
            sums = tl.dot(p.to(values.dtype), values, sums * keep[:, None], input_precision=PRECISION)
            top = higher
    some = total > 0
    inverse = 1.0 / tl.where(some, total, 1.0)
    _write_rows(out + b * out_b + h * out_h, m, out_n, m < Nq, sums * inverse[:, None], D, DP)
    # Two numbers a row: beside a score of a thousand the log of the sum would have no digits left.
    row = softmax + head.to(tl.int64) * Nq + m
    tl.store(row, tl.where(some, top, float("inf")), mask=m < Nq)
    tl.store(row + rows, tl.where(some, inverse, 0.0), mask=m < Nq)


@triton.jit
def softmax_weights(
    scores,  # fp32 [BLOCK_M, BLOCK_N], or transposed
    softmax,  # *[2, .., Nq] of one image and head
    m,  # int32 positions
    Nq, rows,
    ALL: tl.constexpr,  # keys are here, so that the sum is of these very scores, whatever their products rounded
    KEYS: tl.constexpr,  # which axis they are
):  # fmt: skip
    """Softmax over the keys, fp32."""
    if ALL:
        top = tl.max(scores, KEYS)
        top = tl.where(top == NOTHING, 0.0, top)
        p = tl.exp(scores - tl.expand_dims(top, KEYS))
        total = tl.sum(p, KEYS)
        inverse = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    else:
        top = tl.load(softmax + m, mask=m < Nq, other=float("inf"))
        inverse = tl.load(softmax + rows + m, mask=m < Nq, other=0.0)
        p = tl.exp(scores - tl.expand_dims(top, KEYS))
    return p * tl.expand_dims(inverse, KEYS)


@triton.jit
def delta_of_output(out, gradient, m, out_n, Nq, D: tl.constexpr, DP: tl.constexpr):
    """sum(out * gradient of out), which is the sum over all keys of p * dp, where not all keys are at hand."""
    return tl.sum(read_rows(out, m, out_n, m < Nq, D, DP, True) * gradient.to(tl.float32), 1)


@triton.jit
def _backward(
    q, k, v,  # *[B, N, H, D], strided, as in the forward pass
    bias, count, mask,  # as in the forward pass
    out, grad_out,  # *[B, Nq, H, D], strided
    softmax,  # *[2, B, H, Nq] fp32
    dq, dk, dv,  # *[B, N, H, D], strided
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, out_b, out_n, out_h, grad_b, grad_n, grad_h,  # strides
    dq_b, dq_n, dq_h, dk_b, dk_n, dk_h, dv_b, dv_n, dv_h,  # strides
    bias_b, bias_h, bias_m, bias_n,  # strides
    H, Nq, Nk, rows, scale,
    D: tl.constexpr,
    DP: tl.constexpr,
    ONE_TILE: tl.constexpr,  # Nk <= BLOCK_N
    ONE_BLOCK: tl.constexpr,  # Nq <= BLOCK_M as well
    BIAS: tl.constexpr,
    COUNT: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """ONE_TILE: one program per (image, head), which reads everything once. Else one per (image, head, block of keys or
    of queries); each reads its own block once and the other side whole."""
    blocks_n = tl.cdiv(Nk, BLOCK_N)
    blocks = 1 if ONE_TILE else blocks_n + tl.cdiv(Nq, BLOCK_M)
    head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    out += b * out_b + h * out_h
    grad_out += b * grad_b + h * grad_h
    bias += b * bias_b + h * bias_h
    count += b * Nk
    mask += b * Nk
    softmax += head.to(tl.int64) * Nq
    dq += b * dq_b + h * dq_h
    if ONE_TILE or block < blocks_n:
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside, more = read_keys(n, count, mask, Nk, COUNT, MASK)
        keys = read_rows(k, n, k_n, inside, D, DP, UPCAST)
        values = read_rows(v, n, v_n, inside, D, DP, UPCAST)
        k_sums = tl.zeros([BLOCK_N, DP], dtype=tl.float32)
        v_sums = tl.zeros([BLOCK_N, DP], dtype=tl.float32)
        for start in range(0, BLOCK_M if ONE_BLOCK else Nq, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            queries = read_rows(q, m, q_n, m < Nq, D, DP, UPCAST)
            gradient = read_rows(grad_out, m, grad_n, m < Nq, D, DP, UPCAST)
            # Transposed, keys by queries: the gradients of v and k take p and ds as they lie in registers.
            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
            if UPCAST and not ONE_TILE:  # a GPU's sums are the forward pass's either way round, the interpreter's not
                scores = tl.trans(tl.dot(queries, tl.trans(keys), input_precision=PRECISION))
            scores = scores * scale + more[:, None]
            if BIAS:
                scores = add_bias(scores, m[None, :], n[:, None], bias, bias_m, bias_n, Nq, Nk)
            p = softmax_weights(scores, softmax, m, Nq, rows, ONE_TILE, 0)
            v_sums = tl.dot(p.to(keys.dtype), gradient, v_sums, input_precision=PRECISION)
            dp = tl.dot(values, tl.trans(gradient), input_precision=PRECISION)
            if ONE_TILE:
                delta = tl.sum(p * dp, 0)
            else:
                delta = delta_of_output(out, gradient, m, out_n, Nq, D, DP)
            ds = (p * (dp - delta[None, :])).to(keys.dtype)
            k_sums = tl.dot(ds, queries, k_sums, input_precision=PRECISION)
            if ONE_TILE:
                q_sums = tl.dot(tl.trans(ds), keys, input_precision=PRECISION)
                _write_rows(dq, m, dq_n, m < Nq, q_sums * scale, D, DP)
        _write_rows(dk + b * dk_b + h * dk_h, n, dk_n, n < Nk, k_sums * scale, D, DP)
        _write_rows(dv + b * dv_b + h * dv_h, n, dv_n, n < Nk, v_sums, D, DP)
    else:
        m = (block - blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
        queries = read_rows(q, m, q_n, m < Nq, D, DP, UPCAST)
        gradient = read_rows(grad_out, m, grad_n, m < Nq, D, DP, UPCAST)
        delta = delta_of_output(out, gradient, m, out_n, Nq, D, DP)
        q_sums = tl.zeros([BLOCK_M, DP], dtype=tl.float32)
        for start in range(0, Nk, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            inside, more = read_keys(n, count, mask, Nk, COUNT, MASK)
            keys = read_rows(k, n, k_n, inside, D, DP, UPCAST)
            values = read_rows(v, n, v_n, inside, D, DP, UPCAST)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale + more[None, :]
            if BIAS:
                scores = add_bias(scores, m[:, None], n[None, :], bias, bias_m, bias_n, Nq, Nk)
            dp = tl.dot(gradient, tl.trans(values), input_precision=PRECISION)
            ds = softmax_weights(scores, softmax, m, Nq, rows, False, 1) * (dp - delta[:, None])
            q_sums = tl.dot(ds.to(keys.dtype), keys, q_sums, input_precision=PRECISION)
        _write_rows(dq, m, dq_n, m < Nq, q_sums * scale, D, DP)


def _tile(count: int, most: int) -> int:
    """The smallest power of two from 16, what a matrix product needs, to `most` that holds `count`."""
    return min(max(triton.next_power_of_2(count), 16), most)


# One table for all capabilities: the largest tiles that spill nowhere fit into the shared memory of the smallest device
# as well. fp32 products run without matrix units and hold whole operands in registers, so their tiles are small.
def _forward_tiles(
    width: int, queries: int, keys: int, precise: bool, biased: bool
) -> tuple[bool, dict[str, int], int, int]:
    """(whether all keys lie in one tile, blocks, warps, stages)."""
    wide = width > 64
    most = (0 if wide else 64) if precise else 128
    one = keys <= most
    if precise:
        return one, {"BLOCK_M": 32, "BLOCK_N": _tile(keys, most) if one else 32}, 8, 1
    block_n = _tile(keys, most) if one else 64
    middle = block_n == 128 and 32 < width <= 64
    block_m = 32 if middle and biased else 64
    many = block_n == 128 and not middle
    warps = 8 if many or (wide and (biased or not one)) else 4
    return one, {"BLOCK_M": _tile(queries, block_m), "BLOCK_N": block_n}, warps, 1 if one else 2


def _backward_tiles(width: int, queries: int, keys: int, precise: bool) -> tuple[bool, dict[str, int], int, int]:
    """(whether all keys lie in one tile, blocks, warps, stages)."""
    wide = width > 64
    most = (0 if wide else 64) if precise else (64 if wide else 128)
    one = keys <= most
    if precise:
        blocks = (16, _tile(keys, most)) if one else ((16, 16) if wide else (32, 32))
        return one, {"BLOCK_M": blocks[0], "BLOCK_N": blocks[1]}, 8, 1
    if not one:
        return one, {"BLOCK_M": 32, "BLOCK_N": 64}, 8, 2
    # Several blocks of queries keep keys, values and their sums alive between them.
    block_m = _tile(queries, 64) if max(queries, keys) <= 64 else 32
    return one, {"BLOCK_M": block_m, "BLOCK_N": _tile(keys, most)}, 8 if wide or keys > 64 else 4, 1


def _registers(width: int, one: bool, precise: bool, backward: bool) -> int | None:
    """How many a thread may have. Left to itself ptxas spills a few bytes to fit one more block; given room where
    products are fp32 multiply-adds, it may unroll them until that spills: so by what compiles."""
    if not precise:
        return 255 if one and not backward else None
    if backward:
        return 240 if one and width > 32 else None
    return 168


def _near(x: Tensor) -> Tensor:
    """A tensor [B, N, H, D] whose last dimension is dense and whose positions are in reach of 32-bit offsets."""
    return x.contiguous() if x.stride(3) != 1 or x.shape[1] * x.stride(1) >= 1 << 31 else x


def _stands_for(tensor: Tensor | None, instead: Tensor) -> Tensor:
    """What a kernel gets for an argument that it does not read."""
    return instead if tensor is None else tensor


def bias_strides(bias: Tensor | None) -> tuple[int, ...]:
    """Of batch, head, query and key; the batch has 0 where it shares the bias."""
    if bias is None:
        return 0, 0, 0, 0
    strides = bias.stride()[-3:]
    return bias.stride(0) if bias.dim() == 4 and bias.shape[0] > 1 else 0, *strides


def _of_keys(count: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Dense; the mask as the kernels read it."""
    return (
        None if count is None else count.contiguous(),
        None if mask is None else mask.contiguous().view(torch.int8),
    )


def attention_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad_out: Tensor,
    softmax: Tensor,
    bias: Tensor | None,
    key_log_count: Tensor | None,
    key_mask: Tensor | None,
) -> tuple[tuple[Tensor, ...], list[int]]:
    """What backward kernels begin with: (q, k, v, bias, count, mask, out, grad_out, softmax), and the strides of q, k,
    v, out and grad_out."""
    q, k, v, out, grad_out = _near(q), _near(k), _near(v), _near(out), _near(grad_out)
    scores = (_stands_for(x, softmax) for x in (bias, *_of_keys(key_log_count, key_mask)))
    strides = [stride for x in (q, k, v, out, grad_out) for stride in x.stride()[:3]]
    return (q, k, v, *scores, out, grad_out, softmax), strides


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_log_count: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    out: Tensor,
    softmax: Tensor,
) -> None:
    """Fills out [B, Nq, H, D] and softmax [2, B, H, Nq] (fp32: largest score, 1 / sum of exponentials) from views
    q [B, Nq, H, D], k and v [B, Nk, H, D]; bias is
    [H, Nq, Nk], [1, H, Nq, Nk] or [B, H, Nq, Nk], key_log_count and key_mask are [B, Nk]."""
    if out.numel() == 0:
        return
    q, k, v = _near(q), _near(k), _near(v)
    count, mask = _of_keys(key_log_count, key_mask)
    batch, queries, heads, width = q.shape
    keys, precise = k.shape[1], q.dtype == torch.float32
    one, blocks, warps, stages = _forward_tiles(width, queries, keys, precise, bias is not None)
    _forward[(batch * heads * triton.cdiv(queries, blocks["BLOCK_M"]),)](
        q, k, v, _stands_for(bias, softmax), _stands_for(count, softmax), _stands_for(mask, softmax), out, softmax,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *bias_strides(bias),
        heads, queries, keys, batch * heads * queries, scale, width, triton.next_power_of_2(width),
        one, bias is not None, count is not None, mask is not None, "ieee", INTERPRETED, **blocks,
        num_warps=warps, num_stages=stages, maxnreg=_registers(width, one, precise, False), enable_fp_fusion=True,
    )  # fmt: skip


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad_out: Tensor,
    softmax: Tensor,
    bias: Tensor | None,
    key_log_count: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Fills the views dq [B, Nq, H, D], dk, dv [B, Nk, H, D] (last dimension dense)."""
    if k.numel() == 0 or q.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    batch, queries, heads, width = q.shape
    keys, precise = k.shape[1], q.dtype == torch.float32
    one, blocks, warps, stages = _backward_tiles(width, queries, keys, precise)
    programs = 1 if one else triton.cdiv(keys, blocks["BLOCK_N"]) + triton.cdiv(queries, blocks["BLOCK_M"])
    tensors, strides = attention_inputs(q, k, v, out, grad_out, softmax, bias, key_log_count, key_mask)
    _backward[(batch * heads * programs,)](
        *tensors, dq, dk, dv, *strides, *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], *bias_strides(bias),
        heads, queries, keys, batch * heads * queries, scale,
        width, triton.next_power_of_2(width), one, one and queries <= blocks["BLOCK_M"],
        bias is not None, key_log_count is not None, key_mask is not None, "ieee", INTERPRETED, **blocks,
        num_warps=warps, num_stages=stages, maxnreg=_registers(width, one, precise, True), enable_fp_fusion=True,
    )  # fmt: skip


_ROWS = ("q", "k", "v", "out", "grad", "dq", "dk", "dv")


def attention_config(
    kernel: Any,
    element: str,
    width: int,
    one: bool,
    blocks: dict[str, int],
    warps: int,
    stages: int,
    registers: int | None,
    **flags: bool,
) -> Config:
    """One configuration of a kernel of attention; `flags` are its other constants."""
    constants = {"D": width, "DP": triton.next_power_of_2(width), "ONE_TILE": one, **flags}
    constants |= {"PRECISION": "ieee", "UPCAST": False, **blocks}
    constants |= {name: 1 for name in ("bias_n", "dbias_n") if name in kernel.arg_names}
    types = {"bias": "*fp32", "count": "*fp32", "mask": "*i8", "softmax": "*fp32", "dbias": "*fp32", "scale": "fp32"}
    types |= dict.fromkeys(("q", "k", "v", "out", "grad_out", "dq", "dk", "dv"), f"*{element}")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    aligned = tuple(n for n, t in signature.items() if t[0] == "*" or n.split("_")[0] in _ROWS)  # packed rows are
    return Config(kernel, signature, constants, warps, stages, aligned, registers)


def _configs(element: str, width: int, queries: int, keys: int, scores: bool) -> list[Config]:
    """Forward and backward, `scores` with all that can be added to them, which takes the most registers."""
    precise = element == "fp32"
    flags = {"BIAS": scores, "COUNT": scores, "MASK": scores}
    launch = _forward_tiles(width, queries, keys, precise, scores)
    registers = _registers(width, launch[0], precise, False)
    forward = attention_config(_forward, element, width, *launch, registers, **flags)
    launch = _backward_tiles(width, queries, keys, precise)
    registers, block = _registers(width, launch[0], precise, True), launch[0] and queries <= launch[1]["BLOCK_M"]
    return [forward, attention_config(_backward, element, width, *launch, registers, ONE_BLOCK=block, **flags)]


AHEAD_OF_TIME = [
    *[c for width in (32, 64, 128) for n in (50, 128, 197) for c in _configs("bf16", width, n, n, True)],
    *[c for n in (50, 128, 197) for c in _configs("fp16", 64, n, n, False)],
    *_configs("bf16", 64, 16, 16, False),
    *[_configs("bf16", width, 147, 50, True)[1] for width in (32, 64, 128)],  # queries apart from keys
    *[c for width in (40, 48, 80, 96) for c in _configs("fp16", width, 50, 50, False)],
    *[c for width in (32, 64) for n in (50, 197) for c in _configs("fp32", width, n, n, True)],
    *[c for width in (48, 64) for c in _configs("fp32", width, 50, 50, False)],
    *[c for width in (80, 128) for c in _configs("fp32", width, 50, 50, True)],
]
