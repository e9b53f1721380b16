"""mask_token_attention against attention over the assembled sequence: LayerNorm, qkv, attention, projection."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.runner import Case, Settings, Side
from fastmim.layers import FusedBeitAttention, mask_token_attention
from fastmim.ops import decoder_input

# name, visible and all patches, width, heads, a token for each position, with a relative position bias
SHAPES = [
    ("MAE decoder", 49, 196, 512, 16, True, False),
    ("SimMIM ViT-B", 76, 196, 768, 12, False, True),
    ("no positions", 76, 196, 768, 12, False, False),
]


def plain(visible: Tensor, token: Tensor, ids: Tensor, bias: Tensor | None = None, *, norm: Any, attn: Any) -> Tensor:
    return attn(norm(decoder_input(visible, token, ids, num_prefix_tokens=1)), bias)


def once(
    visible: Tensor, token: Tensor, ids: Tensor, bias: Tensor | None = None, *, norm: Any, attn: Any, collapse: bool
) -> Tensor:
    return mask_token_attention(norm, attn, visible, token, ids, num_prefix_tokens=1, bias=bias, collapse_keys=collapse)


def cases(settings: Settings) -> Iterator[Case]:
    batch = 2 if settings.quick else 16 if settings.device.type == "cpu" else 256
    for dtype in settings.dtypes:
        for name, shown, patches, width, heads, own, biased in SHAPES[1:2] if settings.quick else SHAPES:
            like = {"device": settings.device, "dtype": dtype}
            norm, attn = nn.LayerNorm(width).to(**like), FusedBeitAttention(width, heads).to(**like)

            def inputs(
                shown: int = shown, patches: int = patches, width: int = width, heads: int = heads, own: bool = own,
                biased: bool = biased, like: dict[str, Any] = like,
            ) -> tuple[Tensor, ...]:  # fmt: skip
                learned = {**like, "requires_grad": True}
                visible = torch.randn(batch, 1 + shown, width, **learned)
                token = torch.randn(*((patches, width) if own else (width,)), **learned)
                ids = torch.rand(batch, patches, device=settings.device).argsort(dim=1)
                bias = (torch.randn(1, heads, 1 + patches, 1 + patches, **learned),) if biased else ()
                return (visible, token, ids, *bias)

            for collapse in (False,) if own else (False, True):
                keys = ", one key" if collapse else ""
                yield Case(
                    op="mask_token_attention",
                    case=f"{name} B{batch} {shown}+1 of {patches} tokens, width {width}{keys}",
                    candidate=Side("auto", partial(once, norm=norm, attn=attn, collapse=collapse)),
                    baseline=Side("whole sequence", partial(plain, norm=norm, attn=attn)),
                    inputs=inputs,
                    dtype=dtype,
                    images=batch,
                )
