"""Masks for everybody."""

from collections.abc import Callable

import pytest
import torch

from fastmim.ops import TileIndex


@pytest.fixture
def some_tiles() -> Callable[..., TileIndex]:
    """`count` cells of each image, in random order."""

    def make(batch: int, grid: tuple[int, int], count: int, seed: int = 0) -> TileIndex:
        generator = torch.Generator().manual_seed(seed)
        cells = grid[0] * grid[1]
        ids = [torch.randperm(cells, generator=generator)[:count] for _ in range(batch)]
        return TileIndex.from_ids_keep(torch.stack(ids), grid)

    return make
