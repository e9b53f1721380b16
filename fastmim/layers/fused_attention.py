"""timm's self-attention on packed queries, keys and values.

Legend: B batch, N tokens, C width, H heads, D head width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmim.layers.attention_providers import attend, attend_apart, check_provider
from fastmim.layers.linear import Linear
from fastmim.ops import linear

__all__ = ["FusedAttention"]


class FusedAttention(nn.Module):
    """Drop-in for `timm.models.vision_transformer.Attention`: same arguments, same state-dict keys, same result.

    The projection's output [B, N, 3, H, D] is read as it lies and the result is written as the next projection reads
    it: no copies into [B, H, N, D] and back.

    Args:
        dim: C.
        num_heads: H.
        attn_head_dim: D; C / H when None.
        dim_out: width of the output; C when None.
        qkv_bias, proj_bias: biases of the two linear layers.
        qk_norm: norm of each query and key, `norm_layer(D)`.
        scale_norm: norm before the output projection, `norm_layer(H * D)`.
        gated: sigmoid gate, a linear map of the input, before the output projection.
        attn_drop: dropout of the attention weights. Our kernels have none; while it acts, torch's attention runs.
        proj_drop: dropout of the output.
        norm_layer: needed by `qk_norm` and `scale_norm`.
        attention: who computes it: "fastmim", "sdpa", "sdpa_flash", "sdpa_efficient", "sdpa_math", "sdpa_cudnn",
            "xformers" or "flash_attn".

    Raises:
        ValueError: widths that do not fit, or a provider that is not installed.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[[int], nn.Module] | None = None,
        *,
        attention: str = "fastmim",
    ) -> None:
        super().__init__()
        check_provider(attention)
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"FusedAttention: dim {dim} is not divisible by num_heads {num_heads}")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("FusedAttention: qk_norm and scale_norm need a norm_layer, such as nn.LayerNorm")
        self.attention = attention
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.attn_dim = num_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.qkv = Linear(dim, 3 * self.attn_dim, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm and norm_layer else nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm and norm_layer else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(self.attn_dim) if scale_norm and norm_layer else nn.Identity()
        self.gate = Linear(dim, self.attn_dim, bias=qkv_bias) if gated else None
        self.proj = Linear(self.attn_dim, dim_out or dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, C] -> [B, N, dim_out]. attn_mask as `F.scaled_dot_product_attention` takes it for [B, H, N, N]."""
        return self.finish(self.attend(self.project(x), attn_mask, is_causal), x)

    def project(self, x: Tensor) -> Tensor:
        """Rows [..., C] -> their queries, keys and values [..., 3, H, D]; each row by itself."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            return qkv
        q, k, v = qkv.unbind(-3)
        return torch.stack((self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v), dim=-3)

    def of_rows(self, rows: Tensor, x: Tensor) -> Tensor:
        """What `forward` gives for some rows [B, Nq, C] that attend to all of x [B, N, C]: [B, Nq, dim_out].

        Queries are computed for `rows` alone, keys and values for x alone.
        """
        split, heads = self.attn_dim, (self.num_heads, self.head_dim)
        weight, bias = self.qkv.weight, self.qkv.bias
        q = linear(rows, weight[:split], None if bias is None else bias[:split]).unflatten(-1, heads)
        kv = linear(x, weight[split:], None if bias is None else bias[split:]).unflatten(-1, (2, *heads))
        q = self.q_norm(q).to(kv.dtype)
        if not isinstance(self.k_norm, nn.Identity):
            k, v = kv.unbind(-3)
            kv = torch.stack((self.k_norm(k).to(v.dtype), v), dim=-3)
        dropout = self.attn_drop.p if self.training else 0.0
        attended = attend_apart(q, kv, scale=self.scale, dropout=dropout, provider=self.attention)
        return self.finish(attended, rows)

    def attend(self, qkv: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, 3, H, D] -> [B, N, H, D]."""
        dropout = self.attn_drop.p if self.training else 0.0
        bias, key_mask = (attn_mask, None) if attn_mask is None or attn_mask.is_floating_point() else (None, attn_mask)
        unusual = is_causal or (key_mask is not None and not _is_of_keys(key_mask, qkv))
        if unusual or (bias is not None and bias.dim() < 3):
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            mask = attn_mask if key_mask is not None or bias is None else bias.to(q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=self.scale)
            return out.transpose(1, 2)
        if bias is not None:
            tokens = qkv.shape[1]
            images = bias.shape[0] if bias.dim() == 4 else 1
            bias = bias.expand(images, self.num_heads, tokens, tokens)
        if key_mask is not None:
            key_mask = key_mask[:, 0, 0].expand(qkv.shape[0], -1)
        return attend(qkv, bias, key_mask, scale=self.scale, dropout=dropout, provider=self.attention)

    def finish(self, attended: Tensor, x: Tensor) -> Tensor:
        """Attended values [B, N, H, D] of rows whose inputs were x [B, N, C] -> [B, N, dim_out]; each row by itself."""
        out = self.norm(attended.flatten(-2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, attention={self.attention!r}"


def _is_of_keys(mask: Tensor, qkv: Tensor) -> bool:
    """Whether a boolean mask says the same for every head and query: [B or 1, 1, 1, N]."""
    return mask.dim() == 4 and mask.shape[1:] == (1, 1, qkv.shape[1])
