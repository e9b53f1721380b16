"""gather_tiles and scatter_tiles against plain PyTorch: the map times the mask, which is how SparK leaves cells out,
and for scatter_tiles the mask's choice between the map and the token."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.bench_masked_conv import FORMATS, MASK_RATIOS, count_kept
from benchmarks.runner import Case, Settings, Side, backends_here
from fastmim.ops import TileIndex, gather_tiles, scatter_tiles, upsample_mask

# name, tile side, channels, memory format of the map
MAPS = [
    ("image", 32, 3, "NCHW"),
    ("ConvNeXt-T stage 1", 8, 96, "channels_last"),
    ("ResNet-50 stage 3", 2, 1024, "channels_last"),
]


def gathered(dense: Tensor, mask: Tensor, tiles: TileIndex, backend: str) -> Tensor:
    return gather_tiles(dense, tiles, backend=backend)


def times_mask(dense: Tensor, mask: Tensor) -> Tensor:
    return dense * mask


def scattered(x: Tensor, token: Tensor, dense: Tensor, tiles: TileIndex, backend: str) -> Tensor:
    return scatter_tiles(x, tiles, token, backend=backend)


def where_masked(x: Tensor, token: Tensor, dense: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen, dense, token.reshape(1, -1, 1, 1))


def cases(settings: Settings) -> Iterator[Case]:
    batch, grid = (2, (2, 3)) if settings.quick else (8, (7, 7))
    cells = grid[0] * grid[1]
    for ratio in settings.mask_ratios or (MASK_RATIOS[:1] if settings.quick else MASK_RATIOS):
        generator = torch.Generator().manual_seed(0)
        kept = torch.rand(batch, cells, generator=generator).argsort(1)[:, : count_kept(cells, ratio)]
        tiles = TileIndex.from_ids_keep(kept.contiguous().to(settings.device), grid)
        for name, side, channels, layout in MAPS[:1] if settings.quick else MAPS:
            size = grid[0] * side, grid[1] * side
            seen = ~upsample_mask(tiles.slots < 0, grid, size).unsqueeze(1)
            shape = (batch, channels, *size)
            for dtype in settings.dtypes:
                visible = batch * tiles.count * side * side * channels * dtype.itemsize
                whole = batch * channels * size[0] * size[1] * dtype.itemsize

                def dense_and_mask(
                    shape: tuple[int, ...] = shape,
                    dtype: torch.dtype = dtype,
                    seen: Tensor = seen,
                    layout: str = layout,
                ) -> tuple[Tensor, Tensor]:
                    dense = torch.randn(shape, device=seen.device).to(dtype).contiguous(memory_format=FORMATS[layout])
                    return dense.requires_grad_(), seen.to(dtype)

                def tiles_and_token(
                    shape: tuple[int, ...] = shape, dtype: torch.dtype = dtype, tiles: TileIndex = tiles
                ) -> tuple[Tensor, Tensor, Tensor]:
                    dense = torch.randn(shape, device=tiles.device).to(dtype)
                    dense = dense.contiguous(memory_format=torch.channels_last)
                    token = torch.randn(shape[1], device=tiles.device).to(dtype)
                    return gather_tiles(dense, tiles).requires_grad_(), token.requires_grad_(), dense.requires_grad_()

                described = f"{name} B{batch} {channels}x{size[0]}x{size[1]} mask {ratio:.0%}"
                for backend in backends_here("gather_tiles", settings, dtype):
                    yield Case(
                        op="tiles",
                        case=f"gather {described}",
                        candidate=Side(backend, partial(gathered, tiles=tiles, backend=backend)),
                        baseline=Side(f"map x mask, {layout}", times_mask),
                        inputs=dense_and_mask,
                        dtype=dtype,
                        passes=("forward", "both"),
                        tolerance=None,  # the shapes differ; the tests compare
                        images=batch,
                        mask_ratio=1 - tiles.count / cells,
                        moved={"forward": 2 * visible, "both": 3 * visible + whole},
                    )
                for backend in backends_here("scatter_tiles", settings, dtype):
                    yield Case(
                        op="tiles",
                        case=f"scatter with token {described}",
                        candidate=Side(backend, partial(scattered, tiles=tiles, backend=backend)),
                        baseline=Side("where(mask), channels_last", partial(where_masked, seen=seen)),
                        inputs=tiles_and_token,
                        dtype=dtype,
                        passes=("forward", "both"),
                        tolerance=None,
                        images=batch,
                        mask_ratio=1 - tiles.count / cells,
                        moved={"forward": visible + whole, "both": 2 * (visible + whole)},
                    )
