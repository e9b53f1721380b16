"""Triton kernels for the positions of visible patches: their sum with the tokens, and its gradient.

Legend: B batch, K visible patches, N patches of an image, E width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim.kernels.ahead_of_time import Config


@triton.jit
def _add(
    tokens,  # *[B * K, E] contiguous
    positions,  # *[N, E] fp32
    ids_keep,  # *[B * K] int64
    out,  # *[B * K, E] contiguous
    count,  # B * K
    E,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per ROWS tokens and BLOCK channels. Reads and writes each once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64, because B * K * E may exceed 2**31
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (channel < E)[None, :]
    n = tl.load(ids_keep + row, mask=row < count, other=0)
    at = (row * E)[:, None] + channel[None, :]
    x = tl.load(tokens + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(positions + (n * E)[:, None] + channel[None, :], mask=inside, other=0.0)
    tl.store(out + at, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum(
    gradient,  # *[B * K, E] contiguous
    order,  # *[B * K] int64, rows sorted by position, each position's in their order
    begins,  # *[N + 1] int64, where a position's rows begin in order
    out,  # *[N, E] fp32
    E,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per position and BLOCK channels: adds its rows in their order, so two runs agree to the bit."""
    n = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, last = tl.load(begins + n).to(tl.int32), tl.load(begins + n + 1).to(tl.int32)
    sums = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for start in range(first, last, ROWS):
        place = start + tl.arange(0, ROWS)
        row = tl.load(order + place, mask=place < last, other=0)
        at = (row * E)[:, None] + channel[None, :]
        sums += tl.load(gradient + at, mask=(place < last)[:, None] & (channel < E)[None, :], other=0.0).to(tl.float32)
    tl.store(out + n * E + channel, tl.sum(sums, axis=0), mask=channel < E)


ROWS, CHANNELS = 4, 256


def add_positions(tokens: Tensor, positions: Tensor, ids_keep: Tensor, out: Tensor) -> None:
    """Fills out [B, K, E] with tokens + positions[ids_keep]."""
    count, width = ids_keep.numel(), tokens.shape[2]
    if out.numel():
        grid = (triton.cdiv(count, ROWS), triton.cdiv(width, CHANNELS))
        _add[grid](tokens, positions, ids_keep, out, count, width, ROWS, CHANNELS, num_warps=4)


def sum_by_position(gradient: Tensor, ids_keep: Tensor, out: Tensor) -> None:
    """Fills out [N, E] with the sums of gradient [B, K, E] over the rows of each position."""
    count, width = out.shape
    ids, order = torch.sort(ids_keep.flatten(), stable=True)
    begins = torch.searchsorted(ids, torch.arange(count + 1, device=ids.device))
    if out.numel():
        _sum[(count, triton.cdiv(width, CHANNELS))](gradient, order, begins, out, width, ROWS, CHANNELS, num_warps=4)


def _configs(element: str) -> list[Config]:
    tokens = {"tokens": f"*{element}", "positions": "*fp32", "ids_keep": "*i64", "out": "*fp32", "count": "i32"}
    total = {"gradient": f"*{element}", "order": "*i64", "begins": "*i64", "out": "*fp32", "E": "i32"}
    blocks = {"ROWS": ROWS, "BLOCK": CHANNELS}
    return [
        Config(_add, tokens | {"E": "i32"}, blocks, aligned=("tokens", "positions", "out", "E")),
        Config(_sum, total, blocks, aligned=("gradient", "out", "E")),
    ]


AHEAD_OF_TIME = [config for element in ("fp32", "bf16", "fp16") for config in _configs(element)]
