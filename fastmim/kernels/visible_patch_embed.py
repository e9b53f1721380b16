"""Triton kernels around the product of a patch embedding: pixels of visible patches as rows, positions, their sum.

Legend: B batch, C channels, (P, Q) patch, K visible patches, N patches of an image, V = C * P * Q values, E width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim.kernels.ahead_of_time import Config


@triton.jit
def _rows(
    images,  # *[B, C, H, W], strided
    ids_keep,  # *[B, K] int64; only with IDS
    scale_shift,  # *[2, C] fp32; only with SCALED
    rows,  # *[B, K, V] contiguous
    stride_b, stride_c, stride_h, stride_w,  # of images
    K, columns,  # patches in a row of the grid
    C,
    P: tl.constexpr, Q: tl.constexpr,
    IDS: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr,  # values of a patch
):  # fmt: skip
    """One program per visible patch and BLOCK of its values. Reads and writes each once."""
    row = tl.program_id(0).to(tl.int64)  # b * K + k; int64, because B * K * V may exceed 2**31
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = index < C * P * Q
    n = row % K
    if IDS:
        n = tl.load(ids_keep + row)
    c, p, q = index // (P * Q), index // Q % P, index % Q
    at = row // K * stride_b + n // columns * P * stride_h + n % columns * Q * stride_w
    at += c.to(tl.int64) * stride_c + p.to(tl.int64) * stride_h + q.to(tl.int64) * stride_w
    x = tl.load(images + at, mask=inside, other=0).to(tl.float32)
    if SCALED:
        x = x * tl.load(scale_shift + c, mask=inside, other=0.0) + tl.load(scale_shift + C + c, mask=inside, other=0.0)
    tl.store(rows + row * (C * P * Q) + index, x.to(rows.dtype.element_ty), mask=inside)


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


BLOCK = 1024  # values of a patch in one program
ROWS, CHANNELS = 4, 256


def visible_rows(
    images: Tensor, ids_keep: Tensor | None, scale_shift: Tensor | None, patch: tuple[int, int], rows: Tensor
) -> None:
    """Fills rows [B, K, C * p * q] from images [B, C, H, W] of any strides."""
    (batch, visible, values), (p, q) = rows.shape, patch
    if rows.numel():
        block = min(BLOCK, max(64, triton.next_power_of_2(values)))
        _rows[(batch * visible, triton.cdiv(values, block))](
            images, images if ids_keep is None else ids_keep, images if scale_shift is None else scale_shift, rows,
            *images.stride(), visible, images.shape[3] // q, images.shape[1], p, q,
            ids_keep is not None, scale_shift is not None, block, num_warps=4,
        )  # fmt: skip


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


def _configs(pixels: str, element: str, side: int, last: bool, scaled: bool = True) -> list[Config]:
    """last: channels innermost in memory, else a row's pixels."""
    types = {"images": f"*{pixels}", "ids_keep": "*i64", "scale_shift": "*fp32", "rows": f"*{element}"}
    types |= dict.fromkeys(("stride_b", "stride_c", "stride_h", "stride_w", "K", "columns", "C"), "i32")
    unit = "stride_c" if last else "stride_w"
    del types[unit]
    constants = {unit: 1, "P": side, "Q": side, "IDS": True, "SCALED": scaled, "BLOCK": BLOCK}
    tokens = {"tokens": f"*{element}", "positions": "*fp32", "ids_keep": "*i64", "out": "*fp32", "count": "i32"}
    total = {"gradient": f"*{element}", "order": "*i64", "begins": "*i64", "out": "*fp32", "E": "i32"}
    blocks = {"ROWS": ROWS, "BLOCK": CHANNELS}
    return [
        Config(_rows, types, constants, aligned=("images", "rows")),
        Config(_add, tokens | {"E": "i32"}, blocks, aligned=("tokens", "positions", "out", "E")),
        Config(_sum, total, blocks, aligned=("gradient", "out", "E")),
    ]


AHEAD_OF_TIME = [
    *_configs("fp32", "fp32", 16, False, scaled=False),  # images normalised by the loader
    *_configs("fp32", "bf16", 16, False),
    *_configs("u8", "bf16", 16, True),
    *_configs("u8", "fp16", 14, False),
    *_configs("bf16", "bf16", 32, True),
]
