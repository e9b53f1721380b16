"""packed_attention against scaled_dot_product_attention with its layout copies: from the output of the qkv projection
[B, N, 3 * H * D] to the input of the next one [B, N, H * D]."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.runner import Case, Settings, Side, backends_here
from fastmim.ops import packed_attention

# name, N, H, D, with a relative position bias
SHAPES = [
    ("MAE encoder ViT-B 75%", 50, 12, 64, False),
    ("MAE decoder", 197, 16, 32, False),
    ("ViT-B", 197, 12, 64, False),
    ("SimMIM ViT-B", 197, 12, 64, True),
    ("ViT-H 75%", 65, 16, 80, False),
]


def ours(qkv: Tensor, bias: Tensor | None = None, *, heads: int, backend: str) -> Tensor:
    return packed_attention(qkv.unflatten(2, (3, heads, -1)), bias, backend=backend).flatten(2)


def plain(qkv: Tensor, bias: Tensor | None = None, *, heads: int) -> Tensor:
    """As timm and MAE write it."""
    batch, tokens, width = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    mask = None if bias is None else bias.to(qkv.dtype).unsqueeze(0)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(batch, tokens, width // 3)


def cases(settings: Settings) -> Iterator[Case]:
    batch = 2 if settings.quick else 16 if settings.device.type == "cpu" else 256
    for dtype in settings.dtypes:
        for name, tokens, heads, width, biased in SHAPES[1:4:2] if settings.quick else SHAPES:

            def inputs(
                dtype: torch.dtype = dtype, tokens: int = tokens, heads: int = heads, width: int = width,
                biased: bool = biased,
            ) -> tuple[Tensor, ...]:  # fmt: skip
                like = {"device": settings.device, "requires_grad": True}
                qkv = torch.randn(batch, tokens, 3 * heads * width, dtype=dtype, **like)
                return (qkv, torch.randn(heads, tokens, tokens, **like)) if biased else (qkv,)

            row = batch * tokens * heads * width * dtype.itemsize
            product = 2 * batch * heads * tokens**2 * width
            for backend in backends_here("packed_attention", settings, dtype):
                yield Case(
                    op="packed_attention",
                    case=f"{name} B{batch} N{tokens} H{heads} D{width}",
                    candidate=Side(backend, partial(ours, heads=heads, backend=backend)),
                    baseline=Side("SDPA with its copies", partial(plain, heads=heads)),
                    inputs=inputs,
                    dtype=dtype,
                    images=batch,
                    moved={"forward": 4 * row, "backward": 8 * row, "both": 12 * row},
                    flops={"forward": 2 * product, "backward": 5 * product, "both": 7 * product},
                )
