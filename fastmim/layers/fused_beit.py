"""BEiT's attention and block, with timm's arguments and keys, on packed queries, keys and values.

Legend: B batch, N tokens, C width, H heads, D head width, R rows of a bias table.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmim.layers.attention_providers import attend, check_provider
from fastmim.layers.drop_path import drop_path as build_drop_path
from fastmim.layers.fused_block import add_scaled
from fastmim.layers.linear import Linear
from fastmim.layers.mlp import Mlp
from fastmim.layers.relative_positions import look_up_bias, num_relative_positions, relative_position_index
from fastmim.ops import linear

__all__ = ["FusedBeitAttention", "FusedBeitBlock"]


class FusedBeitAttention(nn.Module):
    """Drop-in for `timm.models.beit.Attention`: keys have no bias, scores may have one for each displacement.

    Args:
        dim, num_heads, attn_head_dim: C, H, and D (C / H when None).
        qkv_bias: bias of queries and values (one of keys would cancel in the softmax).
        qkv_bias_separate: add it after the product, as some timm models were trained; the same up to rounding.
        attn_drop, proj_drop: dropout of attention weights (see `FusedAttention`) and of the output.
        window_size: grid of patches; gives the bias its table. None has no bias of its own.
        own_index: keep the table's index in a buffer, as timm does; False where each call passes it.
        attention: see `FusedAttention`.
    """

    relative_position_index: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qkv_bias_separate: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_size: tuple[int, int] | None = None,
        attn_head_dim: int | None = None,
        *,
        own_index: bool = True,
        attention: str = "fastmim",
    ) -> None:
        super().__init__()
        check_provider(attention)
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"FusedBeitAttention: dim {dim} is not divisible by num_heads {num_heads}")
        self.attention = attention
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.scale = self.head_dim**-0.5
        width = num_heads * self.head_dim
        self.qkv_bias_separate = qkv_bias_separate
        self.qkv = Linear(dim, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(width)) if qkv_bias else None
        rows = num_relative_positions(window_size) if window_size else 0
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads)) if rows else None
        index = relative_position_index(window_size) if window_size and own_index else None
        self.register_buffer("relative_position_index", index, persistent=False)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = Linear(width, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, shared_rel_pos_bias: Tensor | None = None, relative_position_index: Tensor | None = None
    ) -> Tensor:
        """[B, N, C] -> [B, N, C].

        shared_rel_pos_bias: [1 or B, H, N, N], added to the scores. relative_position_index: [N, N] or [B, N, N], read
        instead of the buffer.
        """
        bias = self.bias(shared_rel_pos_bias, relative_position_index)
        return self.finish(self.attend(self.project(x), bias))

    def project(self, x: Tensor) -> Tensor:
        """Rows [..., C] -> their queries, keys and values [..., 3, H, D]; each row by itself."""
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        if bias is not None and self.qkv_bias_separate:
            qkv = self.qkv(x) + bias
        else:
            qkv = linear(x, self.qkv.weight, bias)
        return qkv.unflatten(-1, (3, self.num_heads, self.head_dim))

    def bias(self, shared: Tensor | None, index: Tensor | None = None) -> Tensor | None:
        """What is added to the scores: the shared bias plus that of this layer's table."""
        index = self.relative_position_index if index is None else index
        if self.relative_position_bias_table is None or index is None:
            return shared
        own = look_up_bias(self.relative_position_bias_table, index)
        return own if shared is None else own + shared

    def attend(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
        """[B, N, 3, H, D] -> [B, N, H, D]."""
        if bias is not None and bias.dim() == 4:
            bias = bias.expand(-1, self.num_heads, -1, -1)
        dropout = self.attn_drop.p if self.training else 0.0
        return attend(qkv, bias, scale=self.scale, dropout=dropout, provider=self.attention)

    def finish(self, attended: Tensor) -> Tensor:
        """Attended values [B, N, H, D] -> [B, N, C]; each row by itself."""
        return self.proj_drop(self.proj(attended.flatten(-2)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, attention={self.attention!r}"


class FusedBeitBlock(nn.Module):
    """Drop-in for `timm.models.beit.Block`: pre-norm, LayerScale named `gamma_1` and `gamma_2`.

    Args:
        dim, num_heads, qkv_bias, attn_drop, proj_drop, window_size, attn_head_dim, own_index, attention: see
            `FusedBeitAttention`.
        mlp_ratio: hidden width of the MLP relative to `dim`.
        scale_mlp: a norm inside the MLP.
        drop_path: rate of stochastic depth.
        init_values: start of LayerScale; None or 0 has none.
        act_layer, norm_layer: what builds activation and norms.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = False,
        mlp_ratio: float = 4.0,
        scale_mlp: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        init_values: float | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        window_size: tuple[int, int] | None = None,
        attn_head_dim: int | None = None,
        *,
        own_index: bool = True,
        attention: str = "fastmim",
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = FusedBeitAttention(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            window_size=window_size,
            attn_head_dim=attn_head_dim,
            own_index=own_index,
            attention=attention,
        )
        self.drop_path1 = build_drop_path(drop_path)
        self.norm2 = norm_layer(dim)
        hidden_norm = norm_layer if scale_mlp else None
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, norm_layer=hidden_norm, drop=proj_drop)
        self.drop_path2 = build_drop_path(drop_path)
        self.gamma_1 = nn.Parameter(torch.full((dim,), init_values)) if init_values else None
        self.gamma_2 = nn.Parameter(torch.full((dim,), init_values)) if init_values else None

    def forward(
        self, x: Tensor, shared_rel_pos_bias: Tensor | None = None, relative_position_index: Tensor | None = None
    ) -> Tensor:
        """[B, N, C] -> [B, N, C]; see `FusedBeitAttention.forward`."""
        return self.finish(x, self.attn(self.norm1(x), shared_rel_pos_bias, relative_position_index))

    def run(self, function: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
        """See `FusedBlock.run`."""
        return function(self, *inputs, **settings)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the block, each row by itself: rows x [B, N, C] and what attention says of them."""
        x = add_scaled(x, attended, self.gamma_1, self.drop_path1)
        return add_scaled(x, self.mlp(self.norm2(x)), self.gamma_2, self.drop_path2)
