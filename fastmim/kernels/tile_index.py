"""Triton kernel for the tables of visible cells. The slots are the only state, and one block has all of an image's."""

import triton
import triton.language as tl
from torch import Tensor

from fastmim.kernels.ahead_of_time import Config


@triton.jit
def _tables(
    ids_keep,  # *[B, K] int64
    slots,  # *[B, N] int32
    neighbours,  # *[B, K, 7, 7] int32
    K, N, rows, columns,  # N = rows * columns
    REACH: tl.constexpr,
    BLOCK: tl.constexpr,  # cells, or entries of the table, at a time
):  # fmt: skip
    """One program per image. Writes 4 bytes a cell and 196 a visible one; slots come back from the cache."""
    WINDOW: tl.constexpr = 2 * REACH + 1
    image = tl.program_id(0).to(tl.int64)  # int64, because B * K * 49 may exceed 2**31
    ids_keep, slots, neighbours = ids_keep + image * K, slots + image * N, neighbours + image * K * WINDOW * WINDOW
    for start in range(0, N, BLOCK):
        cell = start + tl.arange(0, BLOCK)
        tl.store(slots + cell, tl.full([BLOCK], -1, tl.int32), mask=cell < N)
    tl.debug_barrier()  # what one thread of the block wrote, another may write or read from here on
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        cell = tl.load(ids_keep + k, mask=k < K, other=-1)
        tl.store(slots + cell, k, mask=(cell >= 0) & (cell < N))  # an id that cannot be is not written through
    tl.debug_barrier()
    for start in range(0, K * WINDOW * WINDOW, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        k, place = entry // (WINDOW * WINDOW), entry % (WINDOW * WINDOW)
        cell = tl.load(ids_keep + k, mask=k < K, other=0).to(tl.int32)
        row, column = cell // columns + place // WINDOW - REACH, cell % columns + place % WINDOW - REACH
        inside = (k < K) & (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        tl.store(neighbours + entry, tl.load(slots + row * columns + column, mask=inside, other=-1), mask=k < K)


REACH, BLOCK = 3, 1024


def tile_index(ids_keep: Tensor, slots: Tensor, neighbours: Tensor, grid: tuple[int, int]) -> None:
    """Fills slots [B, N] and neighbours [B, K, 7, 7] from ids_keep [B, K]; all contiguous, on one device."""
    batch, count = ids_keep.shape
    if batch:
        _tables[(batch,)](ids_keep, slots, neighbours, count, grid[0] * grid[1], *grid, REACH, BLOCK, num_warps=8)


AHEAD_OF_TIME = [
    Config(
        _tables,
        {"ids_keep": "*i64", "slots": "*i32", "neighbours": "*i32", "K": "i32", "N": "i32", "rows": "i32"}
        | {"columns": "i32"},
        {"REACH": REACH, "BLOCK": BLOCK},
        num_warps=8,
        aligned=("ids_keep", "slots", "neighbours"),
    )
]
