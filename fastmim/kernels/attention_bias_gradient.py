"""Triton kernel for the gradient of an attention bias; packed_attention.py has the others.

Legend: B batch, H heads, Nq queries, Nk keys, D head width, DP the power of two that holds D.

A bias belongs to a head and mostly to all images at once, so its gradient adds up over the batch, which the others do
not: a program keeps one block of it in registers and goes through its images in order. Nothing is added up by atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim.kernels.ahead_of_time import Config
from fastmim.kernels.packed_attention import (
    INTERPRETED,
    add_bias,
    attention_config,
    attention_inputs,
    bias_strides,
    delta_of_output,
    read_keys,
    read_rows,
    softmax_weights,
)


@triton.jit
def _bias_gradient(
    q, k, v,  # *[B, N, H, D], strided
    bias, count, mask,  # as in the forward pass
    out, grad_out,  # *[B, Nq, H, D], strided
    softmax,  # *[2, B, H, Nq] fp32
    dbias,  # *[parts, H, Nq, Nk], strided: summed over the images of a part
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, out_b, out_n, out_h, grad_b, grad_n, grad_h,  # strides
    bias_b, bias_h, bias_m, bias_n, dbias_p, dbias_h, dbias_m, dbias_n,  # strides
    B, H, Nq, Nk, rows, images, scale,  # images of a part
    D: tl.constexpr,
    DP: tl.constexpr,
    ONE_TILE: tl.constexpr,  # Nk <= BLOCK_N
    COUNT: tl.constexpr,
    MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per (part of the batch, head, block of queries, block of keys), which goes through its images in
    order. Reads a block of q, k, v, out and its gradient per image, writes one block."""
    blocks_n = tl.cdiv(Nk, BLOCK_N)
    blocks = blocks_n * tl.cdiv(Nq, BLOCK_M)
    head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    part, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    m = block // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    first = part * images
    for b in range(first, tl.minimum(first + images, B)):
        inside, more = read_keys(n, count + b * Nk, mask + b * Nk, Nk, COUNT, MASK)
        queries = read_rows(q + b * q_b + h * q_h, m, q_n, m < Nq, D, DP, UPCAST)
        gradient = read_rows(grad_out + b * grad_b + h * grad_h, m, grad_n, m < Nq, D, DP, UPCAST)
        keys = read_rows(k + b * k_b + h * k_h, n, k_n, inside, D, DP, UPCAST)
        values = read_rows(v + b * v_b + h * v_h, n, v_n, inside, D, DP, UPCAST)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale + more[None, :]
        at_head = bias + b * bias_b + h * bias_h
        scores = add_bias(scores, m[:, None], n[None, :], at_head, bias_m, bias_n, Nq, Nk)
        dp = tl.dot(gradient, tl.trans(values), input_precision=PRECISION)
        p = softmax_weights(scores, softmax + (b * H + h) * Nq, m, Nq, rows, ONE_TILE, 1)
        delta = (
            tl.sum(p * dp, 1)
            if ONE_TILE
            else delta_of_output(out + b * out_b + h * out_h, gradient, m, out_n, Nq, D, DP)
        )
        sums += p * (dp - delta[:, None])
    at = dbias + part * dbias_p + h * dbias_h + m[:, None] * dbias_m + n[None, :] * dbias_n
    tl.store(at, sums.to(dbias.dtype.element_ty), mask=(m < Nq)[:, None] & (n < Nk)[None, :])


_PROGRAMS = 2048  # that the batch is split for; fixed, so that the order of summation is


def _bias_tiles(width: int, keys: int, precise: bool) -> tuple[dict[str, int], int]:
    """(blocks, warps)."""
    if precise:
        return {"BLOCK_M": 16, "BLOCK_N": 64 if width <= 64 and keys <= 64 else 32}, 8
    return {"BLOCK_M": 32, "BLOCK_N": 64}, 8 if width > 64 else 4


def bias_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    grad_out: Tensor,
    softmax: Tensor,
    bias: Tensor,
    key_log_count: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    dbias: Tensor,
) -> None:
    """Fills dbias, shaped as the bias; the other arguments are those of `packed_attention.backward`."""
    if k.numel() == 0 or q.numel() == 0:
        dbias.zero_()
        return
    tensors, strides = attention_inputs(q, k, v, out, grad_out, softmax, bias, key_log_count, key_mask)
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    blocks, warps = _bias_tiles(width, keys, q.dtype == torch.float32)
    programs = heads * triton.cdiv(queries, blocks["BLOCK_M"]) * triton.cdiv(keys, blocks["BLOCK_N"])
    shared = dbias.dim() == 3 or dbias.shape[0] == 1
    images = triton.cdiv(batch, min(batch, triton.cdiv(_PROGRAMS, programs))) if shared else 1
    parts = triton.cdiv(batch, images)
    partial = softmax.new_empty((parts, heads, queries, keys)) if shared else dbias
    _bias_gradient[(parts * programs,)](
        *tensors, partial, *strides, *bias_strides(bias), *partial.stride(),
        batch, heads, queries, keys, batch * heads * queries, images, scale, width, triton.next_power_of_2(width),
        keys <= blocks["BLOCK_N"], key_log_count is not None, key_mask is not None, "ieee", INTERPRETED, **blocks,
        num_warps=warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    if shared:
        dbias.copy_(partial.sum(0).view(dbias.shape))


def _bias_config(element: str, width: int, keys: int) -> Config:
    blocks, warps = _bias_tiles(width, keys, element == "fp32")
    one = keys <= blocks["BLOCK_N"]
    return attention_config(_bias_gradient, element, width, one, blocks, warps, 1, None, COUNT=True, MASK=True)


AHEAD_OF_TIME = [
    _bias_config(element, width, keys) for element in ("bf16", "fp32") for width in (64, 128) for keys in (32, 50, 197)
]
