"""Triton kernel for fixed-count random masks. No sort: a cell's rank is the number of cells that come before it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim.kernels.ahead_of_time import Config


@triton.jit
def noise(
    cell,  # [...] int32 cell numbers
    image,  # scalar uint32, index in the global batch
    seed,  # scalar int64
    step,  # scalar int64
):
    """Word cell % 4 of Philox(seed, (cell // 4, image, step low, step high)), uint32."""
    zero = (cell * 0).to(tl.uint32)
    step_low = (step & 0xFFFFFFFF).to(tl.uint32)
    step_high = ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed.to(tl.uint64, bitcast=True), (cell // 4).to(tl.uint32), zero + image, zero + step_low, zero + step_high, 10
    )
    word = cell % 4
    return tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))


@triton.jit
def rank_of(
    cell,  # [BLOCK] int32 cell numbers
    index,  # scalar uint32, image (or group) in the global batch
    seed,  # scalar int64
    step,  # scalar int64
    N,  # cells
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,  # cells compared with at a time
):
    """How many of N cells come before each, by (noise, cell): [BLOCK] int32."""
    mine = noise(cell, index, seed, step)
    rank = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, N, CHUNK):
        other = start + tl.arange(0, CHUNK)
        theirs = noise(other, index, seed, step)
        before = (theirs[None, :] < mine[:, None]) | (
            (theirs[None, :] == mine[:, None]) & (other[None, :] < cell[:, None])
        )
        rank += tl.sum((before & (other < N)[None, :]).to(tl.int32), axis=1)
    return rank


@triton.jit
def _forward(
    rng,  # *[3] int64: seed, step, first
    ids_keep,  # *[B, K] int64
    ids_restore,  # *[B, N] int64
    mask,  # *[B, N] int8 view of bool, 1 = removed
    N, K,
    BLOCK: tl.constexpr,  # cells ranked by one program
    CHUNK: tl.constexpr,  # cells compared with at a time
):  # fmt: skip
    """One program per (image, block of cells). Reads 24 bytes, writes 9 per cell and 8 per visible cell; the noise is
    drawn again for every chunk, which is cheaper than a sort's barriers and needs no shared order."""
    image = tl.program_id(0).to(tl.int64)  # int64, because B * N may exceed 2**31
    seed, step, first = tl.load(rng), tl.load(rng + 1), tl.load(rng + 2)
    index = ((first + image) & 0xFFFFFFFF).to(tl.uint32)
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rank = rank_of(cell, index, seed, step, N, BLOCK, CHUNK)
    inside = cell < N
    tl.store(ids_restore + image * N + cell, rank.to(tl.int64), mask=inside)
    tl.store(mask + image * N + cell, (rank >= K).to(tl.int8), mask=inside)
    tl.store(ids_keep + image * K + rank, cell.to(tl.int64), mask=inside & (rank < K))


BLOCK, CHUNK = 64, 32


def random_mask(rng: Tensor, ids_keep: Tensor, ids_restore: Tensor, mask: Tensor) -> None:
    """Fills ids_keep [B, K], ids_restore [B, N] and mask [B, N] from rng [3]; all contiguous, on one device."""
    batch, cells = ids_restore.shape
    if batch == 0:
        return
    grid = (batch, triton.cdiv(cells, BLOCK))
    _forward[grid](
        rng, ids_keep, ids_restore, mask.view(torch.int8), cells, ids_keep.shape[1], BLOCK, CHUNK, num_warps=4
    )  # fmt: skip


AHEAD_OF_TIME = [
    Config(
        _forward,
        {"rng": "*i64", "ids_keep": "*i64", "ids_restore": "*i64", "mask": "*i8", "N": "i32", "K": "i32"},
        {"BLOCK": BLOCK, "CHUNK": CHUNK},
        aligned=("rng", "ids_keep", "ids_restore", "mask"),
    )
]
