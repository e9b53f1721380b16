"""unmix against the plain way: a comparison, a where over repeated sequences, cls repeated, positions added."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.runner import Case, Settings, Side, backends_here
from fastmim.ops import mixing_map, unmix

SIZE, WIDTH = 4, 512


def plain(
    mixed: Tensor, segments: Tensor, mask_token: Tensor, positions: Tensor, weight: Tensor, bias: Tensor, norm: bool
) -> Tensor | tuple[Tensor, Tensor]:
    images = torch.arange(SIZE, device=segments.device).view(1, -1, 1)
    shows = (segments[:, None] == images).unsqueeze(-1)
    patches = torch.where(shows, mixed[:, None, 1:], mask_token.to(mixed.dtype)).flatten(0, 1)
    x = torch.cat((mixed[:, :1].repeat_interleave(SIZE, 0), patches), dim=1) + positions
    return (x, F.layer_norm(x, (WIDTH,), weight.to(x.dtype), bias.to(x.dtype), 1e-6)) if norm else x


def fused(
    mixed: Tensor, segments: Tensor, mask_token: Tensor, positions: Tensor, weight: Tensor, bias: Tensor,
    norm: bool, backend: str,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    affine = {"norm_weight": weight, "norm_bias": bias} if norm else {}
    return unmix(mixed, segments, SIZE, mask_token, positions, num_prefix_tokens=1, backend=backend, **affine)


def cases(settings: Settings) -> Iterator[Case]:
    sequences, length = (1, 16) if settings.quick else (16, 196)
    for dtype in settings.dtypes:
        for norm in (True,) if settings.quick else (False, True):

            def inputs(dtype: torch.dtype = dtype, norm: bool = norm) -> tuple[Tensor, ...]:
                def normal(*shape: int, dtype: torch.dtype = torch.float32, learned: bool = True) -> Tensor:
                    return torch.randn(shape, device=settings.device, dtype=dtype, requires_grad=learned)

                rng = torch.randint(0, 2**31, (3,), device=settings.device)
                return (
                    normal(sequences, 1 + length, WIDTH, dtype=dtype),
                    mixing_map(sequences, SIZE, length, rng).segments,
                    normal(WIDTH),
                    normal(1 + length, WIDTH, dtype=dtype, learned=False),
                    normal(WIDTH, learned=norm),
                    normal(WIDTH, learned=norm),
                )

            mixed = sequences * (1 + length) * WIDTH * dtype.itemsize
            forward = mixed * (1 + SIZE * (1 + norm))
            for backend in backends_here("unmix", settings, dtype):
                yield Case(
                    op="unmix",
                    case=f"B{sequences * SIZE} G{SIZE} L{length}+1, width {WIDTH}{', LayerNorm' if norm else ''}",
                    candidate=Side(backend, partial(fused, norm=norm, backend=backend)),
                    baseline=Side("torch eager", partial(plain, norm=norm)),
                    inputs=inputs,
                    dtype=dtype,
                    images=sequences * SIZE,
                    moved={"forward": forward, "backward": forward, "both": 2 * forward},
                )
