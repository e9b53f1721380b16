"""patch_mix against the plain way: normalise all images, cut all into patches, gather those that the map names.

`select` ends at the rows that the embedding's matrix product reads; `embed` has that product and positions, too.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.runner import Case, Settings, Side, backends_here
from fastmim.ops import mixing_map, patch_mix
from fastmim.ops.patch_arguments import scale_shift_of
from fastmim.ops.patch_mix import image_of_position
from fastmim.ops.patch_rows import patch_rows

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def plain_select(images: Tensor, segments: Tensor, patch: int, dtype: torch.dtype) -> Tensor:
    """[S, L, C * p * p] of uint8 images [B, C, H, W]."""
    mean, std = (torch.tensor(s, device=images.device).view(1, -1, 1, 1) for s in (MEAN, STD))
    pixels = ((images.float() / 255 - mean) / std).to(dtype)
    batch, channels, height, width = images.shape
    cells = pixels.reshape(batch, channels, height // patch, patch, width // patch, patch)
    rows = cells.permute(0, 2, 4, 1, 3, 5).reshape(segments.shape[0], -1, segments.shape[1], channels * patch**2)
    at = segments[:, None, :, None].expand(-1, 1, -1, rows.shape[-1])
    return torch.gather(rows, 1, at).squeeze(1)


def plain_embed(
    images: Tensor, segments: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, dtype: torch.dtype
) -> Tensor:
    rows = plain_select(images, segments, weight.shape[-1], dtype)
    return F.linear(rows, weight.flatten(1), bias) + positions


def our_select(images: Tensor, segments: Tensor, patch: int, dtype: torch.dtype, backend: str) -> Tensor:
    scale_shift = scale_shift_of(images, MEAN, STD, dtype)
    image_ids = image_of_position(segments, images.shape[0] // segments.shape[0])
    return patch_rows(images, image_ids, None, scale_shift, (patch, patch), dtype, backend=backend)


def cases(settings: Settings) -> Iterator[Case]:
    batch, side, patch, width, size = (4, 32, 8, 16, 4) if settings.quick else (64, 224, 16, 768, 4)
    length, values = (side // patch) ** 2, 3 * patch**2
    groups = batch // size
    for dtype in settings.dtypes:

        def given(dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
            images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=settings.device)
            rng = torch.randint(0, 2**31, (3,), device=settings.device)
            return images, mixing_map(groups, size, length, rng).segments

        def parameters(dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
            options = {"dtype": dtype, "device": settings.device, "requires_grad": True}
            weight = torch.randn(width, 3, patch, patch, **options)
            return *given(), weight, torch.randn(width, **options), torch.randn(length, width, **options)

        rows = groups * length
        moved = rows * values * (1 + dtype.itemsize)
        flops = 2 * rows * values * width
        for backend in backends_here("patch_mix", settings, dtype):
            yield Case(
                op="patch_mix",
                case=f"select B{batch} G{size} {side}px p{patch} uint8",
                candidate=Side(backend, partial(our_select, patch=patch, dtype=dtype, backend=backend)),
                baseline=Side("torch eager", partial(plain_select, patch=patch, dtype=dtype)),
                inputs=given,
                dtype=dtype,
                passes=("forward",),
                images=batch,
                moved={"forward": moved},
            )
            yield Case(
                op="patch_mix",
                case=f"embed B{batch} G{size} {side}px p{patch} E{width} uint8",
                candidate=Side(backend, partial(patch_mix, mean=MEAN, std=STD, backend=backend)),
                baseline=Side("torch eager", partial(plain_embed, dtype=dtype)),
                inputs=parameters,
                dtype=dtype,
                images=batch,
                flops={"forward": flops, "backward": flops, "both": 2 * flops},
            )
