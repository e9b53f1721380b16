"""masked_conv2d against the way of SparK: the dense convolution, times the mask.

One case for each memory format of the baseline; the smaller ratio of the two is the one that counts.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.runner import BenchmarkError, Case, Settings, Side, backends_here
from benchmarks.tile_work import conv_work, joined
from fastmim.ops import TileIndex, gather_tiles, masked_conv2d, scatter_tiles, upsample_mask

FORMATS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
# operation, name, kernel, (tile side, channels) of the stages
LAYERS = [
    ("masked_depthwise", "ConvNeXt-T", 7, [(8, 96), (4, 192), (2, 384), (1, 768)]),
    ("masked_dense", "ResNet-50", 3, [(8, 64), (4, 128), (2, 256), (1, 512)]),
]
MASK_RATIOS = (0.6, 0.75)


def on_tiles(x: Tensor, dense: Tensor, weight: Tensor, tiles: TileIndex, groups: int, backend: str) -> Tensor:
    return masked_conv2d(x, weight, None, tiles, groups=groups, backend=backend)


def dense_times_mask(x: Tensor, dense: Tensor, weight: Tensor, mask: Tensor, groups: int) -> Tensor:
    return F.conv2d(dense, weight, padding=weight.shape[-1] // 2, groups=groups) * mask


def agree(ours: Tensor, theirs: Tensor, tiles: TileIndex, dtype: torch.dtype) -> None:
    """The shapes differ, so the runner cannot compare: done here, once for each set of inputs."""
    error = float((scatter_tiles(ours, tiles) - theirs).float().norm() / theirs.float().norm())
    if not error < (1e-5 if dtype == torch.float32 else 2e-2):
        raise BenchmarkError(f"tiles and dense convolution differ by {error:.2g}")


def cases(settings: Settings) -> Iterator[Case]:
    batch, grid = (2, (2, 3)) if settings.quick else (8, (7, 7))
    cells = grid[0] * grid[1]
    for ratio in settings.mask_ratios or (MASK_RATIOS[:1] if settings.quick else MASK_RATIOS):
        generator = torch.Generator().manual_seed(0)
        keep = count_kept(cells, ratio)
        kept = torch.rand(batch, cells, generator=generator).argsort(1)[:, :keep]
        tiles = TileIndex.from_ids_keep(kept.contiguous().to(settings.device), grid)
        for op, model, k, stages in LAYERS:
            for side, channels in stages[-1:] if settings.quick else stages:
                groups = channels if op == "masked_depthwise" else 1
                size = grid[0] * side, grid[1] * side
                kind = f"{op.removeprefix('masked_')} {k}x{k}"
                mask = ~upsample_mask(tiles.slots < 0, grid, size).unsqueeze(1)
                values, pairs = batch * keep * side**2 * channels, joined(tiles, side, k)
                weight_shape = (channels, channels // groups, k, k)
                for dtype in settings.dtypes:
                    bytes_each = dtype.itemsize
                    work = conv_work(
                        pairs, values, values, weight_shape, bytes_each, weight_bytes=bytes_each, first=False
                    )
                    for layout, memory_format in FORMATS.items():
                        seen = mask.to(dtype, memory_format=memory_format)

                        def inputs(
                            dtype: torch.dtype = dtype, seen: Tensor = seen, tiles: TileIndex = tiles, k: int = k,
                            channels: int = channels, groups: int = groups,
                            memory_format: torch.memory_format = memory_format,
                        ) -> tuple[Tensor, ...]:  # fmt: skip
                            shape = (seen.shape[0], channels, *seen.shape[2:])
                            dense = (torch.randn(shape, device=seen.device).to(dtype) * seen).contiguous(
                                memory_format=memory_format
                            )
                            weight = torch.randn(channels, channels // groups, k, k, device=seen.device).to(dtype) / k
                            x = gather_tiles(dense, tiles)
                            ours = masked_conv2d(x, weight, None, tiles, groups=groups)
                            agree(ours, dense_times_mask(x, dense, weight, seen, groups), tiles, dtype)
                            return x.requires_grad_(), dense.requires_grad_(), weight.requires_grad_()

                        for backend in backends_here(op, settings, dtype):
                            yield Case(
                                op="masked_conv",
                                case=f"{kind} {model} B{batch} {channels}x{size[0]}x{size[1]} mask {ratio:.0%}",
                                candidate=Side(backend, partial(on_tiles, tiles=tiles, groups=groups, backend=backend)),
                                baseline=Side(
                                    f"dense x mask, {layout}", partial(dense_times_mask, mask=seen, groups=groups)
                                ),
                                inputs=inputs,
                                dtype=dtype,
                                passes=("forward", "both"),
                                tolerance=None,
                                images=batch,
                                mask_ratio=1 - keep / cells,
                                flops=work.flops,
                                moved=work.moved,
                            )


def count_kept(cells: int, ratio: float) -> int:
    """Visible cells of an image; at least one."""
    return max(1, round(cells * (1 - ratio)))
