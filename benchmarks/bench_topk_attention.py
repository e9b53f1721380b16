"""topk_attention against the same in plain PyTorch: scores, their k-th largest, a mask, softmax, product; from the
output of the qkv projection [B, N, 3 * H * D] to the input of the next one [B, N, H * D]."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.runner import Case, Settings, Side, backends_here
from fastmim.ops import topk_attention

# name, N, H, D
SHAPES = [("MixedAE ViT-B", 197, 12, 64), ("MixedAE ViT-S", 197, 6, 64)]


def ours(qkv: Tensor, *, heads: int, k: int, backend: str) -> Tensor:
    out = topk_attention(qkv.unflatten(2, (3, heads, -1)), k, backend=backend)
    assert isinstance(out, Tensor)  # and no share, without segments
    return out.flatten(2)


def plain(qkv: Tensor, *, heads: int, k: int) -> Tensor:
    """The usual way; it keeps more than k keys where scores are equal, and cls as a query attends to all."""
    batch, tokens, width = qkv.shape
    query, key, value = qkv.reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    patches = scores.detach()[:, :, 1:, 1:]
    removed = torch.zeros_like(scores, dtype=torch.bool)
    removed[:, :, 1:, 1:] = patches < patches.topk(k, dim=-1).values[..., -1:]
    weights = scores.masked_fill(removed, float("-inf")).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).reshape(batch, tokens, width // 3)


def cases(settings: Settings) -> Iterator[Case]:
    batch = 2 if settings.quick else 16 if settings.device.type == "cpu" else 256
    for dtype in settings.dtypes:
        for name, tokens, heads, width in SHAPES[1:] if settings.quick else SHAPES:

            def inputs(
                dtype: torch.dtype = dtype, tokens: int = tokens, heads: int = heads, width: int = width
            ) -> tuple[Tensor, ...]:
                shape = (batch, tokens, 3 * heads * width)
                return (torch.randn(shape, dtype=dtype, device=settings.device, requires_grad=True),)

            k = (tokens - 1) // 4
            row = batch * tokens * heads * width * dtype.itemsize
            product = 2 * batch * heads * tokens**2 * width
            for backend in backends_here("topk_attention", settings, dtype):
                yield Case(
                    op="topk_attention",
                    case=f"{name} B{batch} N{tokens} H{heads} D{width} k{k}",
                    candidate=Side(backend, partial(ours, heads=heads, k=k, backend=backend)),
                    baseline=Side("torch eager", partial(plain, heads=heads, k=k)),
                    inputs=inputs,
                    dtype=dtype,
                    images=batch,
                    # In half precision the plain way rounds its scores, and so chooses other keys.
                    tolerance="auto" if dtype == torch.float32 else None,
                    moved={"forward": 4 * row, "backward": 8 * row, "both": 12 * row},
                    flops={"forward": 2 * product, "backward": 5 * product, "both": 7 * product},
                )
