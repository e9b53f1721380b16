"""Attention in which each patch finds the patches of its own image in a mixed sequence.

Legend: B mixed sequences, N tokens, P of them a prefix (cls), L = N - P patches, C width, H heads.
"""

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from fastmim.layers.fused_attention import FusedAttention
from fastmim.ops.topk_attention import topk_attention

__all__ = ["HomologousAttention", "count_of_ratio", "homologous_attention"]

Mode = Literal["topk", "oracle", "global"]
MODES = ("topk", "oracle", "global")


def count_of_ratio(topk_ratio: float, num_patches: int) -> int:
    """k: how many of L patches a patch attends to, at least itself."""
    if not 0 < topk_ratio <= 1:
        raise ValueError(f"topk_ratio is the share of the patches that a patch attends to, in (0, 1]; got {topk_ratio}")
    return max(1, round(topk_ratio * num_patches))


def homologous_attention(
    attn: FusedAttention,
    x: Tensor,
    segments: Tensor | None,
    *,
    mode: Mode = "topk",
    topk_ratio: float = 0.25,
    num_prefix_tokens: int = 1,
    measure: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`attn(x)` with its weights, restricted to the patches that belong together.

    Args:
        attn: plain attention; it is not changed, and without this function it is plain.
        x: [B, P + L, C].
        segments: [B, L] int64, which image a patch is from; needed for "oracle" and to measure.
        mode: "topk": each head and patch keeps the k = topk_ratio L patches of largest score, ties to the first.
            "oracle": the patches of the same image, as MixMIM has it; it hands the network the answer. "global": all.
            Prefix tokens attend to everything and everything attends to them, without counting.
        topk_ratio: see there.
        num_prefix_tokens: P.
        measure: with "topk", also say which share of the chosen keys is of the patch's own image, itself left out.

    Returns:
        ([B, P + L, C], that share as an fp32 scalar or None).
    """
    qkv = attn.project(x)
    if mode == "global":
        return attn.finish(attn.attend(qkv), x), None
    if mode == "oracle":
        assert segments is not None
        same = segments[:, None, :, None] == segments[:, None, None, :]
        allowed = F.pad(same, (num_prefix_tokens, 0, num_prefix_tokens, 0), value=True)
        return attn.finish(attn.attend(qkv, allowed), x), None
    k = count_of_ratio(topk_ratio, x.shape[1] - num_prefix_tokens)
    if not measure:
        out = topk_attention(qkv, k, num_prefix_tokens, scale=attn.scale)
        assert isinstance(out, Tensor)
        return attn.finish(out, x), None
    out, share = topk_attention(qkv, k, num_prefix_tokens, segments, scale=attn.scale)
    return attn.finish(out, x), share


class HomologousAttention(FusedAttention):
    """`FusedAttention` for mixed sequences: each patch attends to the patches that fit it best.

    Arguments, state-dict keys and parameters are those of timm's Attention: train with this, then load the same state
    dict into plain attention. Our rule for cls (and registers), which the paper leaves open: as a query it attends to
    everything, as a key everything attends to it, and it is not counted in k.

    Args:
        dim, num_heads, **others: see `FusedAttention`; its `attn_drop` must be 0.
        mode: see `homologous_attention`.
        topk_ratio: share of the patches that a patch attends to; 1 / G for groups of G images is the natural one.
        num_prefix_tokens: tokens before the patches.

    Source: MixedAE (arXiv 2303.17152), section 3.2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        mode: Mode = "topk",
        topk_ratio: float = 0.25,
        num_prefix_tokens: int = 1,
        attn_drop: float = 0.0,
        **others: Any,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"HomologousAttention: mode is one of {', '.join(MODES)}, got {mode!r}")
        if attn_drop:
            raise ValueError(f"HomologousAttention: attn_drop is {attn_drop}; chosen keys are not dropped, give 0")
        count_of_ratio(topk_ratio, 1)
        super().__init__(dim, num_heads, **others)
        self.mode, self.topk_ratio, self.num_prefix_tokens = mode, topk_ratio, num_prefix_tokens

    def forward(  # type: ignore[override]
        self, x: Tensor, segments: Tensor | None = None
    ) -> Tensor:
        """[B, P + L, C] -> the same shape. segments [B, L], which image a patch is from, is read with "oracle" only."""
        if self.mode == "oracle" and segments is None:
            raise ValueError("HomologousAttention: mode 'oracle' needs segments [B, L], which image each patch is from")
        return self._attend(x, segments, measure=False)[0]

    def measure(self, x: Tensor, segments: Tensor) -> tuple[Tensor, Tensor | None]:
        """`forward` and the share of chosen keys that are of the patch's own image (None unless mode is "topk")."""
        return self._attend(x, segments, measure=True)

    def _attend(self, x: Tensor, segments: Tensor | None, measure: bool) -> tuple[Tensor, Tensor | None]:
        return homologous_attention(
            self,
            x,
            segments,
            mode=self.mode,
            topk_ratio=self.topk_ratio,
            num_prefix_tokens=self.num_prefix_tokens,
            measure=measure,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}, topk_ratio={self.topk_ratio}"
