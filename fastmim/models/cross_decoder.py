"""CrossMAE's decoder: mask tokens read the encoder's output by cross-attention and never see each other.

Legend: B batch, T encoded tokens, K visible patches, N all patches, M decoded of the N - K removed, D encoder width,
d decoder width, P values of a patch, F feature maps of the encoder, H heads.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fastmim.layers import Linear
from fastmim.layers.mask_token_decoder import NORM_EPS, init_mae_linear
from fastmim.layers.mlp import Mlp
from fastmim.layers.row_index import inverse_permutation
from fastmim.layers.sincos_positions import sincos_positions
from fastmim.models.partial_decoder import put_back
from fastmim.ops import attention

__all__ = ["CrossDecoder"]


class CrossAttention(nn.Module):
    """Queries of one sequence [B, M, d], keys and values of another [B, T, D]."""

    def __init__(self, dim: int, memory_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.kv = Linear(memory_dim, 2 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (self.num_heads, -1))
        kv = self.kv(memory).unflatten(2, (2, self.num_heads, -1))
        return self.proj(attention(q, kv).flatten(2))


class CrossBlock(nn.Module):
    """Pre-norm block: cross-attention, MLP; no self-attention."""

    def __init__(self, dim: int, memory_dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = CrossAttention(dim, memory_dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), memory)
        return x + self.mlp(self.norm2(x))


class CrossDecoder(nn.Module):
    """Mask token + fixed sin-cos position of each decoded patch, cross-attention blocks, norm, Linear d -> P.

    A patch is predicted without regard to the other removed ones, so any part of them can be decoded: the first
    `num_decoded` of the image's shuffle, another part in each step.

    Args:
        encoder_dim: D.
        grid: (rows, columns) of patches.
        patch_values: P.
        num_decoded: M.
        num_feature_maps: F; block j then reads LayerNorm_j(sum over i of w_ji map_i) with learned w. 0: all blocks read
            the encoder's output.
        dim, depth, num_heads: of the blocks; d divisible by 4 (positions) and by num_heads.

    Differs from the authors' code: the last feature map is the encoder's normalised output, so that the norm of the
    exported encoder is trained; positions work for rectangular grids.

    Source: CrossMAE (arXiv 2401.14391), section 3: cross-attention, inter-block attention, partial reconstruction.
    """

    def __init__(
        self,
        encoder_dim: int,
        grid: tuple[int, int],
        patch_values: int,
        *,
        num_decoded: int,
        num_feature_maps: int = 0,
        dim: int = 512,
        depth: int = 12,
        num_heads: int = 16,
    ) -> None:
        super().__init__()
        if dim % 4 or dim % num_heads:
            raise ValueError(
                f"CrossDecoder: a width of {dim} must be divisible by 4 (sin-cos positions) and its {num_heads} heads."
            )
        self.num_decoded = num_decoded
        norm = partial(nn.LayerNorm, eps=NORM_EPS)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(dim, grid), requires_grad=False)
        weights = torch.randn(depth, num_feature_maps) / max(num_feature_maps, 1) ** 0.5
        self.feature_weights = nn.Parameter(weights) if num_feature_maps else None
        self.feature_norms = nn.ModuleList(norm(encoder_dim) for _ in range(depth if num_feature_maps else 0))
        self.decoder_blocks = nn.ModuleList(CrossBlock(dim, encoder_dim, num_heads) for _ in range(depth))
        self.decoder_norm = norm(dim)
        self.decoder_pred = Linear(dim, patch_values)
        self.apply(init_mae_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, encoded: Tensor | Sequence[Tensor], ids_restore: Tensor, *, num_visible: int) -> Tensor:
        """Predict the pixels of the decoded patches.

        Args:
            encoded: the encoder's output [B, T, D], or its F feature maps, each [B, T, D].
            ids_restore: [B, N].
            num_visible: K.

        Returns:
            [B, N, P]; rows of visible patches and of those that are not decoded are zero.
        """
        decoded = inverse_permutation(ids_restore)[:, num_visible : num_visible + self.num_decoded]
        x = self.mask_token + self.decoder_pos_embed[0][decoded]  # [B, M, d]
        for block, memory in zip(self.decoder_blocks, self._memories(encoded), strict=True):
            x = block(x, memory)
        return put_back(self.decoder_pred(self.decoder_norm(x)), ids_restore, num_visible)

    def _memories(self, encoded: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
        """What each block reads."""
        if self.feature_weights is None:
            assert isinstance(encoded, Tensor)
            return [encoded] * len(self.decoder_blocks)
        maps = torch.stack(tuple(encoded))  # [F, B, T, D]
        mixed = (self.feature_weights.to(maps.dtype) @ maps.flatten(1)).unflatten(1, maps.shape[1:])
        return [norm(memory) for norm, memory in zip(self.feature_norms, mixed, strict=True)]
