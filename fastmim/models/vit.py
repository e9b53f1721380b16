"""Vision Transformer (arXiv 2010.11929) with the names and state-dict keys of timm's `vision_transformer.py`."""

from typing import Any

import torch
from torch import nn

from fastmim.layers.drop_path import drop_path_rates
from fastmim.layers.sincos_positions import sincos_positions
from fastmim.models.registry import register_encoders
from fastmim.models.token_encoder import TokenEncoder
from fastmim.models.transformer import block, init_linear
from fastmim.models.vit_variants import VIT_VARIANTS

POSITIONS = ("learn", "sincos", "none")


class VisionTransformer(TokenEncoder):
    """Plain pre-norm ViT.

    Args:
        img_size: image size in pixels, one number or (height, width); fixed, because the positions belong to it.
        patch_size: patch size in pixels, one number or (height, width); divides `img_size`.
        in_chans: image channels.
        num_classes: size of the classifier; 0 builds none.
        global_pool: what `forward_head` does with the tokens: "token" (cls), "avg" (mean of the patches), "" (nothing).
        embed_dim, depth, num_heads, mlp_ratio: token width, number of blocks, attention heads, hidden width of an MLP
            relative to `embed_dim`.
        qkv_bias: bias of the query, key and value projections.
        init_values: start of LayerScale; None or 0 builds none.
        class_token: put a cls token in front.
        pos_embed: "learn"; "sincos" for MAE's fixed embedding (stored under the same state-dict key, without
            gradient, zero for prefix tokens); "none".
        no_embed_class: positions for the patches only, not for cls and registers.
        reg_tokens: number of register tokens (arXiv 2309.16588), after the cls token.
        fc_norm: put the last norm after pooling instead of before; when None, that is where `global_pool` is "avg".
            Pre-training with "avg" usually wants False, so that the tokens themselves are normalised.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        pos_embed: str = "learn",
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        fc_norm: bool | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        num_prefix_tokens = int(class_token) + reg_tokens
        super().__init__(
            img_size, patch_size, in_chans, num_classes, global_pool, embed_dim, num_heads, num_prefix_tokens
        )
        if global_pool == "token" and not class_token:
            raise ValueError('global_pool="token" reads the cls token, which class_token=False leaves out; use "avg"')
        if pos_embed not in POSITIONS:
            raise ValueError(f"pos_embed is one of {', '.join(map(repr, POSITIONS))}, but was given {pos_embed!r}")
        self.no_embed_class = no_embed_class
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, embed_dim)) if reg_tokens else None
        self.pos_embed = self._positions(pos_embed)
        self.blocks = nn.ModuleList(
            block(embed_dim, num_heads, mlp_ratio, qkv_bias, init_values, rate)
            for rate in drop_path_rates(drop_path_rate, depth)
        )
        self._build_head(norm_after_pool=global_pool == "avg" if fc_norm is None else fc_norm)
        self.apply(init_linear)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)

    def _positions(self, kind: str) -> nn.Parameter | None:
        with_prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        if kind == "none":
            return None
        if kind == "sincos":
            return nn.Parameter(sincos_positions(self.embed_dim, self.grid_size, with_prefix), requires_grad=False)
        positions = torch.empty(1, with_prefix + self.patch_embed.num_patches, self.embed_dim)
        return nn.Parameter(nn.init.trunc_normal_(positions, std=0.02))

    @staticmethod
    def to_timm(kwargs: dict[str, Any]) -> dict[str, Any]:
        """timm has no fixed positions; its learned ones hold them under the same key."""
        return {key: value for key, value in kwargs.items() if (key, value) != ("pos_embed", "sincos")}


register_encoders(VisionTransformer, VIT_VARIANTS)
