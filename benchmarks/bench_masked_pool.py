"""Pooling over tiles against the way of SparK: the dense pooling, times the mask.

One case for each memory format of the baseline; the smaller ratio of the two is the one that counts.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_masked_conv import FORMATS, MASK_RATIOS, count_kept
from benchmarks.runner import BenchmarkError, Case, Settings, Side, backends_here
from fastmim.ops import TileIndex, gather_tiles, masked_avg_pool2d, masked_max_pool2d, scatter_tiles, upsample_mask

# name, operation, the dense one, (k, s, padding), tile side, channels
POOLS = [
    ("max 3x3/2 ResNet-50 stem", "masked_max_pool2d", F.max_pool2d, (3, 2, 1), 16, 64),
    ("avg 2x2/2 ResNet-50-D", "masked_avg_pool2d", F.avg_pool2d, (2, 2, 0), 8, 256),
]
OPERATIONS = {"masked_max_pool2d": masked_max_pool2d, "masked_avg_pool2d": masked_avg_pool2d}


def on_tiles(x: Tensor, dense: Tensor, tiles: TileIndex, op: str, window: tuple[int, ...], backend: str) -> Tensor:
    return OPERATIONS[op](x, tiles, *window, backend=backend)


def dense_times_mask(
    x: Tensor, dense: Tensor, mask: Tensor, pool: Callable[..., Tensor], window: tuple[int, ...]
) -> Tensor:
    return pool(dense, *window) * mask


def cases(settings: Settings) -> Iterator[Case]:
    batch, grid = (2, (2, 3)) if settings.quick else (8, (7, 7))
    cells = grid[0] * grid[1]
    for ratio in settings.mask_ratios or (MASK_RATIOS[:1] if settings.quick else MASK_RATIOS):
        generator = torch.Generator().manual_seed(0)
        kept = torch.rand(batch, cells, generator=generator).argsort(1)[:, : count_kept(cells, ratio)]
        tiles = TileIndex.from_ids_keep(kept.contiguous().to(settings.device), grid)
        for name, op, pool, window, side, channels in POOLS:
            size = grid[0] * side, grid[1] * side
            mask = ~upsample_mask(tiles.slots < 0, grid, size).unsqueeze(1)
            pooled = ~upsample_mask(tiles.slots < 0, grid, (size[0] // 2, size[1] // 2)).unsqueeze(1)
            for dtype in settings.dtypes:
                values = batch * tiles.count * side * side * channels
                moved = (values + values // 4) * dtype.itemsize
                for layout, memory_format in FORMATS.items():
                    seen = pooled.to(dtype, memory_format=memory_format)

                    def inputs(
                        dtype: torch.dtype = dtype, mask: Tensor = mask, seen: Tensor = seen, op: str = op,
                        tiles: TileIndex = tiles, channels: int = channels, window: tuple[int, ...] = window,
                        pool: Callable[..., Tensor] = pool, memory_format: torch.memory_format = memory_format,
                    ) -> tuple[Tensor, ...]:  # fmt: skip
                        shape = (mask.shape[0], channels, *mask.shape[2:])
                        # Not negative, as after a ReLU: then the masked zeros of the dense way never win a maximum.
                        dense = torch.rand(shape, device=mask.device).to(dtype).masked_fill(~mask, 0)
                        dense = dense.contiguous(memory_format=memory_format)
                        x = gather_tiles(dense, tiles)
                        ours = scatter_tiles(OPERATIONS[op](x, tiles, *window), tiles)
                        theirs = dense_times_mask(x, dense, seen, pool, window)
                        if not torch.allclose(ours.float(), theirs.float(), atol=1e-5 if dtype.itemsize > 2 else 1e-2):
                            raise BenchmarkError("tiles and dense pooling differ")
                        return x.requires_grad_(), dense.requires_grad_()

                    times_mask = partial(dense_times_mask, mask=seen, pool=pool, window=window)
                    for backend in backends_here(op, settings, dtype):
                        pooled_tiles = partial(on_tiles, tiles=tiles, op=op, window=window, backend=backend)
                        yield Case(
                            op="masked_pool",
                            case=f"{name} B{batch} {channels}x{size[0]}x{size[1]} mask {ratio:.0%}",
                            candidate=Side(backend, pooled_tiles),
                            baseline=Side(f"dense x mask, {layout}", times_mask),
                            inputs=inputs,
                            dtype=dtype,
                            passes=("forward", "both"),
                            tolerance=None,
                            images=batch,
                            mask_ratio=1 - tiles.count / cells,
                            moved={"forward": moved, "both": 2 * moved},
                        )
