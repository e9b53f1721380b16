"""visible_patch_embed against normalising all pixels, embedding all patches by a convolution, and a gather."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.runner import Case, Settings, Side, backends_here
from fastmim.ops import visible_patch_embed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def plain(
    images: Tensor, ids_keep: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, mean: Tensor, std: Tensor
) -> Tensor:
    if images.dtype == torch.uint8:
        images = images.to(weight.dtype) / 255
    images = ((images - mean) / std).to(weight.dtype)
    tokens = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2) + positions
    return tokens.gather(1, ids_keep.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))


def fused(
    images: Tensor, ids_keep: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, *_: Tensor, backend: str
) -> Tensor:
    return visible_patch_embed(images, ids_keep, weight, bias, positions, mean=MEAN, std=STD, backend=backend)


def cases(settings: Settings) -> Iterator[Case]:
    side, width, patch = (64, 32, 16) if settings.quick else (224, 768, 16)
    patches = (side // patch) ** 2
    kept, values = patches // 4, 3 * patch**2
    for dtype in settings.dtypes:
        options = ((2, True, False),) if settings.quick else (
            (16, False, False), (16, True, False), (64, False, False), (64, True, False), (16, True, True)
        )  # fmt: skip
        for batch, as_bytes, learned in options:

            def inputs(
                dtype: torch.dtype = dtype, batch: int = batch, as_bytes: bool = as_bytes, learned: bool = learned
            ) -> tuple[Tensor, ...]:
                device = settings.device
                shape = (batch, 3, side, side)
                pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
                return (
                    pixels if as_bytes else pixels.to(dtype) / 255,
                    torch.rand(batch, patches, device=device).argsort(dim=1)[:, :kept],
                    (0.03 * torch.randn(width, 3, patch, patch, device=device)).to(dtype).requires_grad_(),
                    torch.randn(width, device=device, dtype=dtype, requires_grad=True),
                    torch.randn(patches, width, device=device, dtype=dtype, requires_grad=learned),
                    torch.tensor(MEAN, device=device).view(1, 3, 1, 1),
                    torch.tensor(STD, device=device).view(1, 3, 1, 1),
                )

            flops = 2 * batch * kept * values * width
            kind = "uint8" if as_bytes else "float"
            for backend in backends_here("visible_patch_embed", settings, dtype):
                yield Case(
                    op="visible_patch_embed",
                    case=f"ViT-B B{batch} {side}px p{patch} mask 75% {kind}{', learned positions' if learned else ''}",
                    candidate=Side(backend, partial(fused, backend=backend)),
                    baseline=Side("normalise + conv + gather", plain),
                    inputs=inputs,
                    dtype=dtype,
                    images=batch,
                    flops={"forward": flops, "backward": flops, "both": 2 * flops},
                )
