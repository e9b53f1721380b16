"""timm's pre-norm transformer block on `FusedAttention`.

Legend: B batch, N tokens, C width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmim.layers.drop_path import DropPath
from fastmim.layers.drop_path import drop_path as build_drop_path
from fastmim.layers.fused_attention import FusedAttention
from fastmim.layers.mlp import LayerScale, Mlp

__all__ = ["FusedBlock", "add_branch", "add_scaled"]


class FusedBlock(nn.Module):
    """Drop-in for `timm.models.vision_transformer.Block`: same arguments, same state-dict keys, same result.

    Attention reads the packed projection (see `FusedAttention`); gain, stochastic depth and residual sum of a branch
    are one pass.

    Args:
        dim, num_heads: width and heads.
        mlp_ratio: hidden width of the MLP relative to `dim`.
        qkv_bias, qk_norm, proj_bias, attn_drop: see `FusedAttention`; `proj_bias` is also that of the MLP.
        scale_attn_norm, scale_mlp_norm: norms inside the attention and inside the MLP.
        proj_drop: dropout after the output projection and in the MLP.
        init_values: start of LayerScale; None or 0 has none.
        drop_path: rate of stochastic depth.
        act_layer, norm_layer, mlp_layer: what builds activation, norms and MLP.
        attention: see `FusedAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        mlp_layer: Callable[..., nn.Module] = Mlp,
        *,
        attention: str = "fastmim",
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = FusedAttention(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            scale_norm=scale_attn_norm,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_layer=norm_layer,
            attention=attention,
        )
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = build_drop_path(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = mlp_layer(
            in_features=dim,
            hidden_features=int(dim * mlp_ratio),
            act_layer=act_layer,
            norm_layer=norm_layer if scale_mlp_norm else None,
            bias=proj_bias,
            drop=proj_drop,
        )
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = build_drop_path(drop_path)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        return self.finish(x, self.attn(self.norm1(x), attn_mask, is_causal))

    def run(self, function: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
        """`function(self, *inputs, **settings)`, for what computes with parts of a block instead of calling it.

        Where the weights of a block are spread over processes they are gathered for a call of the block or of this, no
        longer. Tensors to be differentiated have to be among the inputs.
        """
        return function(self, *inputs, **settings)

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the block, each row by itself: rows x [B, N, C] and what attention says of them."""
        x = add_branch(x, attended, self.ls1, self.drop_path1)
        return add_branch(x, self.mlp(self.norm2(x)), self.ls2, self.drop_path2)


def add_branch(x: Tensor, branch: Tensor, scale: nn.Module, drop_path: nn.Module) -> Tensor:
    """x + drop_path(scale(branch)) in one pass; x and branch [B, N, C]."""
    return add_scaled(x, branch, scale.gamma if isinstance(scale, LayerScale) else None, drop_path)


def add_scaled(x: Tensor, branch: Tensor, gain: Tensor | None, drop_path: nn.Module) -> Tensor:
    """x + drop_path(gain * branch) in one pass; gain [C] or None."""
    if isinstance(drop_path, DropPath) and drop_path.active:
        kept = drop_path.draw(x)
        gain = kept if gain is None else gain * kept
    return x + branch if gain is None else torch.addcmul(x, branch, gain)
