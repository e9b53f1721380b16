"""Triton kernels for attention to the keys of largest score: one launch chooses, one attends, one goes back.

Legend: B batch, H heads, N tokens, P of them a prefix, D head width, DP the power of two that holds D, W words of bits.

The choice is handed on as bits, not as a threshold: then nothing depends on two kernels computing the same score to
the last digit, and the attending kernels may take whatever tiles suit them.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim.kernels.ahead_of_time import Config
from fastmim.ops.topk_attention import MOST_TOKENS_ON_CHIP

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # bf16 products are wrong there: operands become fp32
NOTHING = tl.constexpr(float("-inf"))
LOWEST, HIGHEST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)


@triton.jit
def _rows(
    start,  # pointer to [N, D] of one image and head
    n,  # int32 positions
    stride,  # between positions
    inside,  # bool, as n
    first,  # column that the tile begins with
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # of the tile
    UPCAST: tl.constexpr,  # to fp32
):
    """[len(n), WIDTH], zeros outside."""
    d = first + tl.arange(0, WIDTH)
    at = start + n.to(tl.int64)[:, None] * stride + d[None, :]  # int64, because a long row times N may exceed 2**31
    rows = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    return rows.to(tl.float32) if UPCAST else rows


@triton.jit
def _write_rows(start, n, stride, inside, rows, D: tl.constexpr, DP: tl.constexpr):
    """Stores [len(n), DP] where inside, in the precision of the destination."""
    d = tl.arange(0, DP)
    at = start + n.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, rows.to(start.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def _chosen(
    bits,  # *[N, W] of one image and head
    m, n,  # int32 positions of queries and keys, shaped to be broadcast
    N, W,
):  # fmt: skip
    """bool, as m and n broadcast."""
    words = tl.load(bits + m * W + n // 32, mask=(m < N) & (n < N), other=0)
    return ((words >> (n % 32)) & 1) != 0


@triton.jit
def _in_order(scores):
    """int32 in the order of the floats: both zeros equal, what is not a number above all."""
    image = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    image = tl.where(image < 0, image ^ HIGHEST, image)
    return tl.where(scores == scores, image, HIGHEST)


@triton.jit
def _choose(
    q, k,  # *[B, N, H, D], strided, D dense
    segments,  # *[B, N - P] int32 image of each patch; only with SEGMENTS
    lse,  # *[B, H, N] fp32, log of the sum of exponentials of the chosen scores
    bits,  # *[B, H, N, W] int32, bit j of word i: key 32 * i + j
    tally,  # *[B, H, N, 2] int32, chosen keys of the query's image, and of any, without itself; only with SEGMENTS
    q_b, q_n, q_h, k_b, k_n, k_h,  # strides
    H, N, P, W, kept, scale,
    D: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    CHUNK: tl.constexpr,  # columns of q and k at a time
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # power of two >= N, at least 32
):  # fmt: skip
    """One program per (image, head, block of queries), with all scores of its queries in registers. Reads its queries
    and all keys once, writes a bit for each score."""
    blocks = tl.cdiv(N, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    scores = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(0, D, CHUNK):
        queries = _rows(q, m, q_n, m < N, first, D, CHUNK, UPCAST)
        keys = _rows(k, n, k_n, n < N, first, D, CHUNK, UPCAST)
        scores = tl.dot(queries, tl.trans(keys), scores, input_precision=PRECISION)
    scores *= scale
    patch = (n >= P) & (n < N)
    image = tl.where(patch[None, :], _in_order(scores), LOWEST)
    # The largest number that at least `kept` scores reach, bit by bit from the sign on.
    enough = tl.sum((image >= 0).to(tl.int32), 1) >= kept
    threshold = tl.where(enough, 0, LOWEST)
    for step in range(31):
        higher = threshold + (1 << (30 - step))
        enough = tl.sum((image >= higher[:, None]).to(tl.int32), 1) >= kept
        threshold = tl.where(enough, higher, threshold)
    above, tied = image > threshold[:, None], image == threshold[:, None]
    wanted = kept - tl.sum(above.to(tl.int32), 1)
    chosen = above | (tied & (tl.cumsum(tied.to(tl.int32), 1) <= wanted[:, None]))
    chosen = (chosen & patch[None, :]) | ((n < P)[None, :] | ((m < P)[:, None] & (n < N)[None, :]))
    top = tl.max(tl.where(chosen, scores, NOTHING), 1)
    total = tl.sum(tl.where(chosen, tl.exp(scores - top[:, None]), 0.0), 1)
    row = head * N + m
    tl.store(lse + row, top + tl.log(total), mask=m < N)
    words = tl.reshape(chosen.to(tl.int32) << (n % 32)[None, :], [BLOCK_M, BLOCK_N // 32, 32])
    w = tl.arange(0, BLOCK_N // 32)
    at = bits + row[:, None] * W + w[None, :]
    tl.store(at, tl.sum(words, 2), mask=(m < N)[:, None] & (w < W)[None, :])
    if SEGMENTS:
        segments += b * (N - P) - P
        counted = chosen & patch[None, :] & (m >= P)[:, None] & (m[:, None] != n[None, :])
        own = tl.load(segments + m, mask=(m >= P) & (m < N), other=0)
        other = tl.load(segments + n, mask=patch, other=0)
        same = tl.sum((counted & (own[:, None] == other[None, :])).to(tl.int32), 1)
        tl.store(tally + 2 * row, same, mask=m < N)
        tl.store(tally + 2 * row + 1, tl.sum(counted.to(tl.int32), 1), mask=m < N)


@triton.jit
def _forward(
    q, k, v,  # *[B, N, H, D], strided, D dense
    out,  # *[B, N, H, D], strided
    lse,  # *[B, H, N] fp32
    bits,  # *[B, H, N, W] int32
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, out_b, out_n, out_h,  # strides
    H, N, W, scale,
    D: tl.constexpr,
    DP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per (image, head, block of queries). Reads its queries and all keys and values once."""
    blocks = tl.cdiv(N, BLOCK_M)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    bits += head * N * W
    queries = _rows(q + b * q_b + h * q_h, m, q_n, m < N, 0, D, DP, UPCAST)
    log = tl.load(lse + head * N + m, mask=m < N, other=0.0)
    sums = tl.zeros([BLOCK_M, DP], dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keys = _rows(k, n, k_n, n < N, 0, D, DP, UPCAST)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        p = tl.where(_chosen(bits, m[:, None], n[None, :], N, W), tl.exp(scores - log[:, None]), 0.0)
        values = _rows(v, n, v_n, n < N, 0, D, DP, UPCAST)
        sums = tl.dot(p.to(values.dtype), values, sums, input_precision=PRECISION)
    _write_rows(out + b * out_b + h * out_h, m, out_n, m < N, sums, D, DP)


@triton.jit
def _backward(
    q, k, v,  # *[B, N, H, D], strided, D dense
    out, grad_out,  # *[B, N, H, D], strided
    lse,  # *[B, H, N] fp32
    bits,  # *[B, H, N, W] int32
    dq, dk, dv,  # *[B, N, H, D], strided
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, out_b, out_n, out_h, grad_b, grad_n, grad_h,  # strides
    dq_b, dq_n, dq_h, dk_b, dk_n, dk_h, dv_b, dv_n, dv_h,  # strides
    H, N, W, scale,
    D: tl.constexpr,
    DP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per (image, head, block of keys or of queries); each reads its own block once and the other side
    whole, and finishes the gradients of its block."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks = blocks_n + tl.cdiv(N, BLOCK_M)
    head, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    b, h = head // H, head % H
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    out += b * out_b + h * out_h
    grad_out += b * grad_b + h * grad_h
    lse += head * N
    bits += head * N * W
    if block < blocks_n:
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        keys = _rows(k, n, k_n, n < N, 0, D, DP, UPCAST)
        values = _rows(v, n, v_n, n < N, 0, D, DP, UPCAST)
        k_sums = tl.zeros([BLOCK_N, DP], dtype=tl.float32)
        v_sums = tl.zeros([BLOCK_N, DP], dtype=tl.float32)
        for start in range(0, N, BLOCK_M):
            m = start + tl.arange(0, BLOCK_M)
            queries = _rows(q, m, q_n, m < N, 0, D, DP, UPCAST)
            gradient = _rows(grad_out, m, grad_n, m < N, 0, D, DP, UPCAST)
            log = tl.load(lse + m, mask=m < N, other=0.0)
            delta = tl.sum(_rows(out, m, out_n, m < N, 0, D, DP, True) * gradient.to(tl.float32), 1)
            # Transposed, keys by queries: the gradients of v and k take p and ds as they lie in registers.
            scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
            p = tl.where(_chosen(bits, m[None, :], n[:, None], N, W), tl.exp(scores - log[None, :]), 0.0)
            v_sums = tl.dot(p.to(keys.dtype), gradient, v_sums, input_precision=PRECISION)
            dp = tl.dot(values, tl.trans(gradient), input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            k_sums = tl.dot(ds.to(keys.dtype), queries, k_sums, input_precision=PRECISION)
        _write_rows(dk + b * dk_b + h * dk_h, n, dk_n, n < N, k_sums * scale, D, DP)
        _write_rows(dv + b * dv_b + h * dv_h, n, dv_n, n < N, v_sums, D, DP)
    else:
        m = (block - blocks_n) * BLOCK_M + tl.arange(0, BLOCK_M)
        queries = _rows(q, m, q_n, m < N, 0, D, DP, UPCAST)
        gradient = _rows(grad_out, m, grad_n, m < N, 0, D, DP, UPCAST)
        log = tl.load(lse + m, mask=m < N, other=0.0)
        delta = tl.sum(_rows(out, m, out_n, m < N, 0, D, DP, True) * gradient.to(tl.float32), 1)
        q_sums = tl.zeros([BLOCK_M, DP], dtype=tl.float32)
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            keys = _rows(k, n, k_n, n < N, 0, D, DP, UPCAST)
            values = _rows(v, n, v_n, n < N, 0, D, DP, UPCAST)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
            p = tl.where(_chosen(bits, m[:, None], n[None, :], N, W), tl.exp(scores - log[:, None]), 0.0)
            dp = tl.dot(gradient, tl.trans(values), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            q_sums = tl.dot(ds.to(keys.dtype), keys, q_sums, input_precision=PRECISION)
        _write_rows(dq + b * dq_b + h * dq_h, m, dq_n, m < N, q_sums * scale, D, DP)


# fp32 products run without matrix units and hold whole operands in registers, so their tiles are small.
def _choose_tiles(width: int, tokens: int, precise: bool) -> tuple[dict[str, int], int]:
    """(blocks, warps). Above 512 tokens half precision is widened (_widens): matrix units would spill there."""
    block = max(triton.next_power_of_2(tokens), 32)
    chunk = 16 if precise or block > 512 else min(triton.next_power_of_2(width), 64)
    return {"CHUNK": chunk, "BLOCK_M": 16, "BLOCK_N": block}, 16 if block > 512 else 8 if precise or block > 256 else 4


def _widens(tokens: int) -> bool:
    return tokens > 512


def _forward_tiles(width: int, precise: bool) -> tuple[dict[str, int], int, int]:
    """(blocks, warps, stages)."""
    if precise:
        return {"BLOCK_M": 32, "BLOCK_N": 32}, 8, 1
    return {"BLOCK_M": 64, "BLOCK_N": 64}, 8 if width > 64 else 4, 2


def _backward_tiles(width: int, precise: bool) -> tuple[dict[str, int], int, int]:
    """(blocks, warps, stages)."""
    if precise:
        return {"BLOCK_M": 16 if width > 64 else 32, "BLOCK_N": 32}, 8, 1
    return {"BLOCK_M": 32, "BLOCK_N": 64}, 8 if width > 64 else 4, 2


def forward(
    qkv: Tensor,
    kept: int,
    num_prefix_tokens: int,
    segments: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
    chosen: Tensor,
    tally: Tensor,
) -> None:
    """Fills out [B, N, H, D], lse [B, H, N], chosen [B, H, N, W] and, with segments [B, N - P], tally [B, H, N, 2]."""
    if out.numel() == 0:
        return
    q, k, v = qkv.unbind(2)
    batch, tokens, heads, width = q.shape
    assert tokens <= MOST_TOKENS_ON_CHIP, tokens  # with 16 queries
    words, precise = chosen.shape[-1], q.dtype == torch.float32
    blocks, warps = _choose_tiles(width, tokens, precise)
    _choose[(batch * heads * triton.cdiv(tokens, blocks["BLOCK_M"]),)](
        q, k, chosen if segments is None else segments, lse, chosen, tally, *q.stride()[:3], *k.stride()[:3],
        heads, tokens, num_prefix_tokens, words, kept, scale, width, segments is not None, "ieee",
        INTERPRETED or _widens(tokens),
        **blocks, num_warps=warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    blocks, warps, stages = _forward_tiles(width, precise)
    _forward[(batch * heads * triton.cdiv(tokens, blocks["BLOCK_M"]),)](
        q, k, v, out, lse, chosen, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        heads, tokens, words, scale, width, triton.next_power_of_2(width), "ieee", INTERPRETED,
        **blocks, num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip


def backward(
    qkv: Tensor, out: Tensor, grad_out: Tensor, lse: Tensor, chosen: Tensor, scale: float, gradient: Tensor
) -> None:
    """Fills gradient [B, N, 3, H, D]."""
    if gradient.numel() == 0:
        return
    q, k, v = qkv.unbind(2)
    batch, tokens, heads, width = q.shape
    tensors = (q, k, v, out, grad_out)
    gradients = gradient.unbind(2)
    blocks, warps, stages = _backward_tiles(width, q.dtype == torch.float32)
    programs = triton.cdiv(tokens, blocks["BLOCK_N"]) + triton.cdiv(tokens, blocks["BLOCK_M"])
    _backward[(batch * heads * programs,)](
        *tensors, lse, chosen, *gradients, *[stride for x in (*tensors, *gradients) for stride in x.stride()[:3]],
        heads, tokens, chosen.shape[-1], scale, width, triton.next_power_of_2(width), "ieee", INTERPRETED,
        **blocks, num_warps=warps, num_stages=stages, enable_fp_fusion=True,
    )  # fmt: skip


_ROWS = ("q", "k", "v", "out", "grad", "dq", "dk", "dv")


def _config(kernel: Any, element: str, width: int, blocks: dict[str, int], warps: int, stages: int = 1,
            **flags: bool) -> Config:  # fmt: skip
    constants = {"D": width, "PRECISION": "ieee", "UPCAST": False, **flags, **blocks}
    if "DP" in kernel.arg_names:
        constants["DP"] = triton.next_power_of_2(width)
    types = {"segments": "*i32", "lse": "*fp32", "bits": "*i32", "tally": "*i32", "scale": "fp32"}
    types |= dict.fromkeys(("q", "k", "v", "out", "grad_out", "dq", "dk", "dv"), f"*{element}")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    aligned = tuple(n for n, t in signature.items() if t[0] == "*" or n.split("_")[0] in _ROWS)  # packed rows are
    return Config(kernel, signature, constants, warps, stages, aligned)


def _configs(element: str, width: int, tokens: int) -> list[Config]:
    precise = element == "fp32"
    return [
        _config(_choose, element, width, *_choose_tiles(width, tokens, precise), SEGMENTS=True, UPCAST=_widens(tokens)),
        _config(_forward, element, width, *_forward_tiles(width, precise)),
        _config(_backward, element, width, *_backward_tiles(width, precise)),
    ]


AHEAD_OF_TIME = [
    *[c for width in (32, 64, 80, 128) for c in _configs("bf16", width, 197)],
    *[c for tokens in (50, 128, 512, 1024) for c in _configs("fp16", 64, tokens)[:1]],
    *[c for width in (32, 64, 128) for c in _configs("fp32", width, 197)],
    *[c for tokens in (50, 128, 512, 1024) for c in _configs("fp32", 64, tokens)[:1]],
]
