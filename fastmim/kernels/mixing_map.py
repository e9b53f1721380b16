"""Triton kernel for mixing maps. No sort: a position's rank is the number of positions that come before it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim.kernels import random_mask as masks
from fastmim.kernels.ahead_of_time import Config


@triton.jit
def _forward(
    rng,  # *[3] int64: seed, step, first
    segments,  # *[B / G, L] int64
    mask,  # *[B, L] int8 view of bool, 1 = another image's
    L,
    G: tl.constexpr,  # images in a group
    GROUP_BLOCK: tl.constexpr,  # power of two >= G
    BLOCK: tl.constexpr,  # positions ranked by one program
    CHUNK: tl.constexpr,  # positions compared with at a time
):
    """One program per (group, block of positions). Reads 24 bytes, writes 8 + G per position; noise is drawn again
    for every chunk, as random_mask does."""
    group = tl.program_id(0).to(tl.int64)  # int64, because B * L may exceed 2**31
    seed, step, first = tl.load(rng), tl.load(rng + 1), tl.load(rng + 2)
    index = ((first // G + group) & 0xFFFFFFFF).to(tl.uint32)
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rank = masks.rank_of(cell, index, seed, step, L, BLOCK, CHUNK)
    longer = L % G
    in_longer = longer * (L // G + 1)
    part = tl.where(rank < in_longer, rank // (L // G + 1), longer + (rank - in_longer) // (L // G))
    image = tl.arange(0, GROUP_BLOCK)
    mine = masks.noise(L + image, index, seed, step)
    place = tl.zeros([GROUP_BLOCK], dtype=tl.int32)  # of an image in the random order of images
    for other in tl.static_range(G):
        theirs = masks.noise(L + other + tl.zeros([GROUP_BLOCK], dtype=tl.int32), index, seed, step)
        place += ((theirs < mine) | ((theirs == mine) & (other < image))).to(tl.int32)
    owns = (place[None, :] == part[:, None]) & (image < G)[None, :]  # [BLOCK, GROUP_BLOCK], one True a row
    inside = cell < L
    owner = tl.sum(tl.where(owns, image[None, :], 0), axis=1)
    tl.store(segments + group * L + cell, owner.to(tl.int64), mask=inside)
    at = mask + (group * G + image[None, :]) * L + cell[:, None]
    tl.store(at, (owner[:, None] != image[None, :]).to(tl.int8), mask=inside[:, None] & (image < G)[None, :])


def mixing_map(rng: Tensor, group_size: int, segments: Tensor, mask: Tensor) -> None:
    """Fills segments [B / G, L] and mask [B, L] from rng [3]; all contiguous, on one device."""
    groups, cells = segments.shape
    if groups == 0:
        return
    _forward[(groups, triton.cdiv(cells, masks.BLOCK))](
        rng, segments, mask.view(torch.int8), cells, group_size, triton.next_power_of_2(group_size),
        masks.BLOCK, masks.CHUNK, num_warps=4,
    )  # fmt: skip


AHEAD_OF_TIME = [
    Config(
        _forward,
        {"rng": "*i64", "segments": "*i64", "mask": "*i8", "L": "i32"},
        {"G": size, "GROUP_BLOCK": block, "BLOCK": masks.BLOCK, "CHUNK": masks.CHUNK},
        aligned=("rng", "segments", "mask"),
    )
    for size, block in ((2, 2), (4, 4), (7, 8), (8, 8))
]
