"""Our attention against every provider that runs here, from the qkv projection's output to the next one's input."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.runner import Case, Settings, Side, dtype_name
from fastmim.layers.attention_providers import PROVIDERS, attend, check_provider

SHAPES = [("MAE encoder ViT-B 75%", 50, 12, 64), ("MAE decoder", 197, 16, 32), ("ViT-B", 197, 12, 64)]  # N, H, D


def run(qkv: Tensor, *, heads: int, provider: str) -> Tensor:
    return attend(qkv.unflatten(2, (3, heads, -1)), provider=provider).flatten(2)


def providers_here(settings: Settings, dtype: torch.dtype) -> list[str]:
    """Those that are installed and have an operator for the device and dtype, forward and backward."""
    found = []
    for name in PROVIDERS[1:]:
        try:
            check_provider(name)
            qkv = torch.randn(2, 50, 3 * 128, device=settings.device, dtype=dtype, requires_grad=True)
            run(qkv, heads=2, provider=name).sum().backward()
        except (ValueError, RuntimeError, NotImplementedError, ImportError):
            continue
        found.append(name)
    return found


def cases(settings: Settings) -> Iterator[Case]:
    batch = 2 if settings.quick else 16 if settings.device.type == "cpu" else 256
    for dtype in settings.dtypes:
        for provider in providers_here(settings, dtype):
            for name, tokens, heads, width in SHAPES[:1] if settings.quick else SHAPES:

                def inputs(
                    dtype: torch.dtype = dtype, tokens: int = tokens, packed: int = 3 * heads * width
                ) -> tuple[Tensor, ...]:
                    like = {"device": settings.device, "dtype": dtype}
                    return (torch.randn(batch, tokens, packed, **like, requires_grad=True),)

                yield Case(
                    op="attention_providers",
                    case=f"{name} B{batch} N{tokens} H{heads} D{width} {dtype_name(dtype)}",
                    candidate=Side("fastmim", partial(run, heads=heads, provider="fastmim")),
                    baseline=Side(provider, partial(run, heads=heads, provider=provider)),
                    inputs=inputs,
                    dtype=dtype,
                    images=batch,
                )
