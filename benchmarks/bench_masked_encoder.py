"""Whole CNN encoders on visible tiles against the way of SparK: dense maps, channels-last, times the mask.

Forward and backward to every parameter, of the last feature map. `--quick` uses a small encoder.
"""

from collections.abc import Iterator
from functools import cache, partial

import torch
from torch import Tensor, nn

from benchmarks.baselines.masked_cnn import Visible, masked_stages
from benchmarks.baselines.twins import plain_encoder
from benchmarks.bench_masked_conv import MASK_RATIOS, count_kept
from benchmarks.runner import BenchmarkError, Case, Settings, Side
from benchmarks.tile_work import encoder_work
from fastmim.layers import SparseModule, sparsify, stage_names
from fastmim.models import create_encoder
from fastmim.ops import TileIndex, random_mask, scatter_tiles

MODELS = {"convnext_tiny": 224, "resnet50": 224}
QUICK_MODELS = {"resnet18": 64}


@cache
def encoders(name: str, size: int) -> tuple[SparseModule, nn.Module]:
    """The same weights on tiles and in plain dense form; made once, shared by the cases of an encoder."""
    torch.manual_seed(0)
    encoder = create_encoder(name, img_size=size)
    plain = plain_encoder(encoder)
    known = plain.state_dict()  # it ends with the last feature map
    plain.load_state_dict({key: value for key, value in encoder.state_dict().items() if key in known})
    sparse = sparsify(encoder.train(), outputs=stage_names(encoder)[-1])
    return sparse, plain.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def drawn(batch: int, cells: int, keep: int, rng: Tensor) -> tuple[Tensor, Tensor]:
    """(ids_keep, mask) of a random mask, or of none where everything is kept."""
    if keep == cells:
        everything = torch.arange(cells, device=rng.device).repeat(batch, 1)
        return everything, torch.zeros_like(everything, dtype=torch.bool)
    masks = random_mask(batch, cells, keep, rng)
    return masks.ids_keep, masks.mask


def on_tiles(images: Tensor, rng: Tensor, *parameters: Tensor, name: str, keep: int) -> Tensor:
    grid = images.shape[2] // 32, images.shape[3] // 32
    ids_keep, _ = drawn(len(images), grid[0] * grid[1], keep, rng)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.dtype == torch.bfloat16):
        return encoders(name, images.shape[2])[0](images, TileIndex.from_ids_keep(ids_keep, grid))


def dense_times_mask(images: Tensor, rng: Tensor, *parameters: Tensor, name: str, keep: int) -> Tensor:
    grid = images.shape[2] // 32, images.shape[3] // 32
    _, mask = drawn(len(images), grid[0] * grid[1], keep, rng)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.dtype == torch.bfloat16):
        return masked_stages(encoders(name, images.shape[2])[1], images, Visible(mask.float(), grid))[-1]


def agree(images: Tensor, rng: Tensor, name: str, keep: int) -> None:
    """The shapes differ, so the runner cannot compare: done here, once for each set of inputs."""
    grid = images.shape[2] // 32, images.shape[3] // 32
    tiles = TileIndex.from_ids_keep(drawn(len(images), grid[0] * grid[1], keep, rng)[0], grid)
    with torch.no_grad():
        ours = scatter_tiles(on_tiles(images, rng, name=name, keep=keep), tiles).float()
        theirs = dense_times_mask(images, rng, name=name, keep=keep).float()
    error = float((ours - theirs).norm() / theirs.norm())
    if not error < (1e-3 if images.dtype == torch.float32 else 6e-2):
        raise BenchmarkError(f"tiles and dense maps differ by {error:.2g}")


def cases(settings: Settings) -> Iterator[Case]:
    batch = 2 if settings.quick else 8
    for name, size in (QUICK_MODELS if settings.quick else MODELS).items():
        cells = (size // 32) ** 2
        for ratio in settings.mask_ratios or (MASK_RATIOS[:1] if settings.quick else MASK_RATIOS):
            keep = count_kept(cells, ratio)
            rng = torch.tensor([0, 0, 0], device=settings.device)
            tiles = TileIndex.from_ids_keep(drawn(batch, cells, keep, rng)[0], (size // 32, size // 32))
            for dtype in settings.dtypes:

                def inputs(
                    name: str = name, size: int = size, keep: int = keep, dtype: torch.dtype = dtype
                ) -> tuple[Tensor, ...]:
                    sides = [side.to(settings.device) for side in encoders(name, size)]
                    images = torch.randn(batch, 3, size, size, device=settings.device).to(dtype)
                    rng = torch.tensor([0, 0, 0], device=settings.device)
                    agree(images, rng, name, keep)
                    return images, rng, *(p for side in sides for p in side.parameters())

                plain = encoders(name, size)[1].to(settings.device)
                work = encoder_work(plain, tiles, size, dtype.itemsize)
                yield Case(
                    op="masked_encoder",
                    case=f"{name} B{batch} {size}px mask {ratio:.0%}",
                    candidate=Side("auto", partial(on_tiles, name=name, keep=keep)),
                    baseline=Side("dense x mask, channels_last", partial(dense_times_mask, name=name, keep=keep)),
                    inputs=inputs,
                    dtype=dtype,
                    passes=("forward", "both"),
                    tolerance=None,
                    images=batch,
                    mask_ratio=1 - keep / cells,
                    flops=work.flops,
                    moved=work.moved,
                )
