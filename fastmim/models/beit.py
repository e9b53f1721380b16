"""BEiT's transformer (arXiv 2106.08254) with the names and state-dict keys of timm's `beit.py`.

The ViT of SimMIM is this one with a relative position bias shared by all blocks and no absolute positions; that of
A²MIM has absolute positions and a bias of its own in each block.

Legend: B batch, T = 1 + N tokens, D width, H heads, R rows of a bias table.
"""

import math

import torch
from torch import Tensor, nn

from fastmim.layers import FusedBeitBlock
from fastmim.layers.drop_path import drop_path_rates
from fastmim.layers.relative_positions import (
    look_up_bias,
    num_relative_positions,
    relative_position_index,
    visible_pairs,
)
from fastmim.models.registry import register_encoders
from fastmim.models.token_encoder import TokenEncoder
from fastmim.models.transformer import init_linear, norm_layer


class RelativePositionBias(nn.Module):
    """A learned number for each head and displacement, added to the attention scores."""

    def __init__(self, grid_size: tuple[int, int], num_heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.zeros(num_relative_positions(grid_size), num_heads))

    def forward(self, index: Tensor) -> Tensor:
        return look_up_bias(self.relative_position_bias_table, index)


class Beit(TokenEncoder):
    """ViT with a cls token, optional absolute positions and optional relative position biases.

    Args:
        img_size: image size in pixels, one number or (height, width); fixed, because the positions belong to it.
        patch_size: patch size in pixels, one number or (height, width); divides `img_size`.
        in_chans: image channels.
        num_classes: size of the classifier; 0 builds none.
        global_pool: what `forward_head` does with the tokens: "token" (cls), "avg" (mean of the patches), "" (nothing).
        embed_dim, depth, num_heads, mlp_ratio: token width, number of blocks, attention heads, hidden width of an MLP
            relative to `embed_dim`.
        qkv_bias: bias of the query and value projections.
        init_values: start of LayerScale; None or 0 builds none.
        use_abs_pos_emb: learned absolute positions.
        use_rel_pos_bias: a relative position bias in each block.
        use_shared_rel_pos_bias: one relative position bias for all blocks.
        use_fc_norm: put the last norm after pooling instead of before; when None, that is where `global_pool` is
            "avg". Pre-training with "avg" usually wants False, so that the tokens themselves are normalised.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0 at the first.
    """

    relative_position_index: Tensor | None  # the row of a bias table for each pair of tokens

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        use_abs_pos_emb: bool = True,
        use_rel_pos_bias: bool = False,
        use_shared_rel_pos_bias: bool = False,
        use_fc_norm: bool | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, num_classes, global_pool, embed_dim, num_heads, 1)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.reg_token = None
        length = 1 + self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.empty(1, length, embed_dim)) if use_abs_pos_emb else None
        self.rel_pos_bias = RelativePositionBias(self.grid_size, num_heads) if use_shared_rel_pos_bias else None
        index = relative_position_index(self.grid_size) if use_rel_pos_bias or use_shared_rel_pos_bias else None
        self.register_buffer("relative_position_index", index, persistent=False)
        bias_grid = self.grid_size if use_rel_pos_bias else None
        blocks = [
            FusedBeitBlock(
                embed_dim,
                num_heads,
                qkv_bias=qkv_bias,
                mlp_ratio=mlp_ratio,
                drop_path=rate,
                init_values=init_values,
                norm_layer=norm_layer,
                window_size=bias_grid,
                own_index=False,  # one for all blocks: `relative_position_index`
            )
            for rate in drop_path_rates(drop_path_rate, depth)
        ]
        self.blocks = nn.ModuleList(blocks)
        self._build_head(norm_after_pool=global_pool == "avg" if use_fc_norm is None else use_fc_norm)
        self._init_weights(blocks)

    @torch.no_grad()
    def _init_weights(self, blocks: list[FusedBeitBlock]) -> None:
        self.apply(init_linear)
        for embedding in (self.cls_token, self.pos_embed):
            if embedding is not None:
                nn.init.trunc_normal_(embedding, std=0.02)
        for depth, block in enumerate(blocks, start=1):
            block.attn.proj.weight.div_(math.sqrt(2.0 * depth))  # keeps the sum of residual branches in scale
            block.mlp.fc2.weight.div_(math.sqrt(2.0 * depth))
        if isinstance(self.head, nn.Linear):
            self.head.weight.mul_(0.001)

    def _block_context(self, ids_keep: Tensor | None) -> tuple[Tensor | None, ...]:
        index = self.relative_position_index
        if index is not None and ids_keep is not None:
            index = visible_pairs(index, ids_keep)
        shared_bias = self.rel_pos_bias(index) if self.rel_pos_bias is not None else None
        return shared_bias, index

    def no_weight_decay(self) -> set[str]:
        """Tokens, positions and bias tables."""
        tables = {name for name, _ in self.named_parameters() if name.endswith("relative_position_bias_table")}
        return super().no_weight_decay() | tables


_BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
_LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
_POSITIONS = {"use_abs_pos_emb": False, "use_rel_pos_bias": True}

register_encoders(
    Beit,
    {
        "beit_base_patch16_224": {**_BASE, **_POSITIONS, "init_values": 0.1},
        "beit_base_patch16_384": {**_BASE, **_POSITIONS, "init_values": 0.1, "img_size": 384},
        "beit_large_patch16_224": {**_LARGE, **_POSITIONS, "init_values": 1e-5},
        "beit_large_patch16_384": {**_LARGE, **_POSITIONS, "init_values": 1e-5, "img_size": 384},
        "beit_large_patch16_512": {**_LARGE, **_POSITIONS, "init_values": 1e-5, "img_size": 512},
        "beitv2_base_patch16_224": {**_BASE, **_POSITIONS, "init_values": 1e-5},
        "beitv2_large_patch16_224": {**_LARGE, **_POSITIONS, "init_values": 1e-5},
    },
)
