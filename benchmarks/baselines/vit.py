"""A plain ViT, and BEiT's with relative position bias: eager PyTorch with scaled_dot_product_attention.

Legend: B batch, N patches, T tokens (cls and patches), D width, H heads.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    def __init__(self, in_chans: int, dim: int, patch_size: tuple[int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, N, D]


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


class BeitAttention(nn.Module):
    """No bias on keys; a learned bias for each displacement between two tokens, in each block or shared by all."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool, positions: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        if qkv_bias:
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(positions, heads)) if positions else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, index: Tensor | None, shared: Tensor | None) -> Tensor:
        batch, tokens, dim = x.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias)) if hasattr(self, "q_bias") else None
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = qkv.reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        scores = shared
        if self.relative_position_bias_table is not None:
            assert index is not None
            own = self.relative_position_bias_table[index.view(-1)].view(tokens, tokens, self.heads).permute(2, 0, 1)
            scores = own if shared is None else own + shared
        scores = None if scores is None else scores.unsqueeze(0).to(q.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=scores)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, qkv_bias: bool = True, layer_scale: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, qkv_bias)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class BeitBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, qkv_bias: bool, layer_scale: bool, positions: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = BeitAttention(dim, heads, qkv_bias, positions)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.gamma_1 = nn.Parameter(torch.ones(dim)) if layer_scale else 1.0
        self.gamma_2 = nn.Parameter(torch.ones(dim)) if layer_scale else 1.0

    def forward(self, x: Tensor, index: Tensor | None, shared: Tensor | None) -> Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x), index, shared)
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class PlainViT(nn.Module):
    """cls token, absolute positions, pre-norm blocks, final norm."""

    def __init__(
        self,
        *,
        img_size: tuple[int, int],
        patch_size: tuple[int, int],
        in_chans: int,
        dim: int,
        depth: int,
        heads: int,
        hidden: int,
        qkv_bias: bool = True,
        layer_scale: bool = False,
        positions: bool = True,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        self.grid = (img_size[0] // patch_size[0], img_size[1] // patch_size[1])
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        tokens = 1 + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, dim)) if positions else None
        self.blocks = nn.ModuleList(self.make_block(dim, heads, hidden, qkv_bias, layer_scale) for _ in range(depth))
        self.norm: nn.Module = nn.LayerNorm(dim, eps=1e-6) if final_norm else nn.Identity()

    def make_block(self, dim: int, heads: int, hidden: int, qkv_bias: bool, layer_scale: bool) -> nn.Module:
        return Block(dim, heads, hidden, qkv_bias, layer_scale)

    def context(self) -> tuple[Any, ...]:
        """What each block is given besides the tokens."""
        return ()

    def forward_map(self, images: Tensor, insert: Callable[[Tensor], Tensor], at: int = 0) -> Tensor:
        """[B, D, gh, gw]; `insert` acts on the patch tokens before positions (at = 0) or before block `at`."""
        x = self.patch_embed(images)
        if at == 0:
            x = insert(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        context = self.context()
        for i, block in enumerate(self.blocks):
            if i == at and at > 0:
                x = torch.cat((x[:, :1], insert(x[:, 1:])), dim=1)
            x = block(x, *context)
        x = self.norm(x)[:, 1:]
        return x.transpose(1, 2).reshape(x.shape[0], -1, *self.grid)


class PlainBeit(PlainViT):
    """PlainViT with relative position bias, as SimMIM and A²MIM pre-train it."""

    def __init__(self, *, bias_in_blocks: bool, shared_bias: bool, **options: Any) -> None:
        self.bias_in_blocks = bias_in_blocks
        rows, columns = (options["img_size"][i] // options["patch_size"][i] for i in range(2))
        self.positions = (2 * rows - 1) * (2 * columns - 1) + 3
        super().__init__(**options)
        self.rel_pos_bias = None
        if shared_bias:
            table = nn.Parameter(torch.zeros(self.positions, options["heads"]))
            self.rel_pos_bias = nn.ParameterDict({"relative_position_bias_table": table})
        self.register_buffer("index", relative_index(rows, columns), persistent=False)

    def make_block(self, dim: int, heads: int, hidden: int, qkv_bias: bool, layer_scale: bool) -> nn.Module:
        return BeitBlock(dim, heads, hidden, qkv_bias, layer_scale, self.positions if self.bias_in_blocks else 0)

    def context(self) -> tuple[Any, ...]:
        if self.rel_pos_bias is None:
            return self.index, None
        return self.index, self.rel_pos_bias["relative_position_bias_table"][self.index].permute(2, 0, 1)


def relative_index(rows: int, columns: int) -> Tensor:
    """Row of the bias table for each pair of tokens, [1 + N, 1 + N]; three more rows are for the cls token."""
    at = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")).flatten(1)  # [2, N]
    shift = at[:, :, None] - at[:, None, :]
    table = (2 * rows - 1) * (2 * columns - 1)
    index = torch.empty(1 + rows * columns, 1 + rows * columns, dtype=torch.long)
    index[1:, 1:] = (shift[0] + rows - 1) * (2 * columns - 1) + shift[1] + columns - 1
    index[0, :], index[:, 0], index[0, 0] = table, table + 1, table + 2
    return index
