"""MAE's decoder: mask tokens join the encoded visible patches, and a narrow ViT turns all into pixels.

Legend: B batch, K visible patches, N all patches, M = N - K removed, D encoder width, d decoder width, P = p*q*C values
of a patch.
"""

from functools import partial

import torch
from torch import Tensor, nn

from fastmim.layers.fused_block import FusedBlock
from fastmim.layers.linear import Linear
from fastmim.layers.mask_token_attention import mask_token_attention, sequence_of
from fastmim.layers.row_index import inverse_permutation, take_rows
from fastmim.layers.sincos_positions import sincos_positions
from fastmim.ops import decoder_input

__all__ = ["MaskTokenDecoder", "init_mae_linear"]

NORM_EPS = 1e-6


class MaskTokenDecoder(nn.Module):
    """Linear D -> d, mask tokens, un-shuffle, fixed sin-cos positions, pre-norm blocks, norm, Linear d -> P.

    Keys are the official ones: decoder_embed, mask_token, decoder_pos_embed, decoder_blocks, decoder_norm and
    decoder_pred. Exact, and less work than it looks:

    - first block (`share_masked`): removed positions hold mask_token + position in every image, so their LayerNorm,
      queries, keys and values are computed once for the batch;
    - last block, with `removed_only` of the call: visible patches are not predicted, so they give keys and values but
      get no query, projection, MLP and prediction.

    Args:
        encoder_dim: D.
        grid: (rows, columns) of patches.
        patch_values: P.
        num_prefix_tokens: tokens before the patches in the encoder's output (cls, registers); they are decoded too and
            dropped at the end.
        dim, depth, num_heads: of the blocks; d divisible by 4 (positions) and by num_heads.
        share_masked: see above; False computes the removed positions of the first block for every image.
        attention: see `FusedAttention`.

    Source: arXiv 2111.06377, section 3 and appendix A.1.
    """

    def __init__(
        self,
        encoder_dim: int,
        grid: tuple[int, int],
        patch_values: int,
        *,
        num_prefix_tokens: int = 1,
        dim: int = 512,
        depth: int = 8,
        num_heads: int = 16,
        share_masked: bool = True,
        attention: str = "fastmim",
    ) -> None:
        super().__init__()
        if dim % 4 or dim % num_heads:
            raise ValueError(
                f"MaskTokenDecoder: a width of {dim} must be divisible by 4 (sin-cos positions) and by its {num_heads} "
                f"heads."
            )
        self.num_prefix_tokens = num_prefix_tokens
        self.share_masked = share_masked
        self.decoder_embed = Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = sincos_positions(dim, grid, num_prefix_tokens)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        norm = partial(nn.LayerNorm, eps=NORM_EPS)
        self.decoder_blocks = nn.ModuleList(
            FusedBlock(dim, num_heads, qkv_bias=True, norm_layer=norm, attention=attention) for _ in range(depth)
        )
        self.decoder_norm = norm(dim)
        self.decoder_pred = Linear(dim, patch_values)
        self.apply(init_mae_linear)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, ids_restore: Tensor, *, removed_only: bool = False) -> Tensor:
        """Predict the pixels of the patches.

        Args:
            latent: [B, prefix + K, D].
            ids_restore: [B, N].
            removed_only: predict removed patches only; the rows of visible ones are zero.

        Returns:
            [B, N, P].
        """
        prefix = self.num_prefix_tokens
        visible = latent.shape[1] - prefix
        removed_only = removed_only and visible > 0
        x = self.decoder_embed(latent)
        blocks = list(self.decoder_blocks)
        last = blocks.pop() if removed_only else None
        if self.share_masked and blocks:
            x = self._first_block(blocks.pop(0), x, ids_restore)
        else:
            token, positions = self.mask_token.flatten(), self.decoder_pos_embed[0]
            x = sequence_of(decoder_input(x, token, ids_restore, positions, num_prefix_tokens=prefix))
        for block in blocks:
            x = block(x)
        if last is None:
            return self.decoder_pred(self.decoder_norm(x[:, prefix:]))
        removed = inverse_permutation(ids_restore)[:, visible:]
        assert isinstance(last, FusedBlock)
        rows = last.run(_rows_of_block, x, prefix + removed)
        predicted = self.decoder_pred(self.decoder_norm(rows))  # [B, M, P]
        # Back to their places: removed positions are the "visible" ones of the shuffle that begins with them.
        zero, places = predicted.new_zeros(predicted.shape[2]), (ids_restore - visible) % ids_restore.shape[1]
        return sequence_of(decoder_input(predicted, zero, places))

    def _first_block(self, block: nn.Module, x: Tensor, ids_restore: Tensor) -> Tensor:
        """Embedded visible tokens [B, prefix + K, d] -> the sequence [B, prefix + N, d] after the first block."""
        assert isinstance(block, FusedBlock)
        prefix, positions = self.num_prefix_tokens, self.decoder_pos_embed[0]
        ids_keep = inverse_permutation(ids_restore)[:, : x.shape[1] - prefix]
        of_prefix = torch.arange(prefix, device=x.device).expand(x.shape[0], -1)
        x = x + positions[torch.cat((of_prefix, prefix + ids_keep), dim=1)]
        token = self.mask_token[0] + positions[prefix:]  # [N, d], the same for all images
        sequence = sequence_of(decoder_input(x, token, ids_restore, num_prefix_tokens=prefix))
        return block.run(_attend_once, x, token, sequence, ids_restore, num_prefix_tokens=prefix)


def _attend_once(
    block: FusedBlock, x: Tensor, token: Tensor, sequence: Tensor, ids_restore: Tensor, *, num_prefix_tokens: int
) -> Tensor:
    """A block's output for a sequence whose removed rows are `token` in every image."""
    attended = mask_token_attention(block.norm1, block.attn, x, token, ids_restore, num_prefix_tokens=num_prefix_tokens)
    return block.finish(sequence, attended)


def _rows_of_block(block: FusedBlock, x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` [B, M] of what a block gives for x [B, T, d]; all of x are keys and values."""
    normed = block.norm1(x)
    return block.finish(take_rows(x, ids), block.attn.of_rows(take_rows(normed, ids), normed))


def init_mae_linear(module: nn.Module) -> None:
    """The official initialisation of a module: Linear xavier-uniform with zero bias, LayerNorm 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
