"""MAE's decoder over some of the removed patches: partial reconstruction.

Legend: B batch, K visible patches, N all patches, M decoded of the N - K removed, d decoder width, P values of a patch.
"""

from typing import Any

import torch
from torch import Tensor

from fastmim.layers import FusedBlock, MaskTokenDecoder
from fastmim.layers.mask_token_attention import sequence_of
from fastmim.layers.row_index import inverse_permutation
from fastmim.ops import decoder_input

__all__ = ["PartialDecoder", "put_back"]


class PartialDecoder(MaskTokenDecoder):
    """Decodes a random part of the removed patches; the others are neither keys nor queries nor predicted.

    Keys, arguments and everything else are `MaskTokenDecoder`'s, which this is when all are decoded. The part is the
    first `num_decoded` removed patches of the image's shuffle, i.e. another one in each step.

    Source: partial reconstruction as PR-MIM (arXiv 2411.15746) studies it: half of the removed patches thrown away,
    28 % fewer operations and 36 % less memory. Its further parts, furthest sampling of the part and a light prediction
    of what was thrown away, are not here.
    """

    def __init__(self, *arguments: Any, num_decoded: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.num_decoded = num_decoded

    def forward(self, latent: Tensor, ids_restore: Tensor, *, removed_only: bool = True) -> Tensor:
        """As `MaskTokenDecoder.forward`; rows of visible patches and of those that are not decoded are zero."""
        prefix, positions = self.num_prefix_tokens, self.decoder_pos_embed[0]
        visible = latent.shape[1] - prefix
        ids_shuffle = inverse_permutation(ids_restore)
        decoded = ids_shuffle[:, visible : visible + self.num_decoded]  # [B, M]
        of_prefix = torch.arange(prefix, device=latent.device).expand(latent.shape[0], -1)
        x = self.decoder_embed(latent) + positions[torch.cat((of_prefix, prefix + ids_shuffle[:, :visible]), dim=1)]
        token = self.mask_token[0] + positions[prefix:]  # [N, d], the same for all images
        blocks = [block for block in self.decoder_blocks if isinstance(block, FusedBlock)]
        last = blocks.pop() if removed_only else None
        # Indexing, not gather: its gradient adds up in a fixed order on every device.
        sequence = torch.cat((x, token[decoded]), dim=1)
        if self.share_masked and blocks:
            first = blocks.pop(0)
            sequence = first.run(_attend_once, x, token, sequence, decoded)
        for block in blocks:
            sequence = block(sequence)
        rows = sequence[:, prefix + visible :]
        if last is not None:
            rows = last.run(_last_rows, sequence, prefix + visible)
        return put_back(self.decoder_pred(self.decoder_norm(rows)), ids_restore, visible)


def _attend_once(block: FusedBlock, x: Tensor, token: Tensor, sequence: Tensor, decoded: Tensor) -> Tensor:
    """A block's output for x [B, P + K, d] followed by the rows `decoded` [B, M] of token [N, d]: `sequence`."""
    of_visible, of_token = (block.attn.project(block.norm1(rows)) for rows in (x, token))
    packed = torch.cat((of_visible, of_token[decoded]), dim=1)
    return block.finish(sequence, block.attn.finish(block.attn.attend(packed), sequence))


def _last_rows(block: FusedBlock, sequence: Tensor, first: int) -> Tensor:
    """A block's output for the rows from `first` on; all are keys and values."""
    normed = block.norm1(sequence)
    return block.finish(sequence[:, first:], block.attn.of_rows(normed[:, first:], normed))


def put_back(predicted: Tensor, ids_restore: Tensor, num_visible: int) -> Tensor:
    """Predictions [B, M, P] of the first M removed patches of each shuffle at their places: [B, N, P], zero elsewhere.

    They are the "visible" ones of the shuffle that begins with the removed patches.
    """
    zero, places = predicted.new_zeros(predicted.shape[2]), (ids_restore - num_visible) % ids_restore.shape[1]
    return sequence_of(decoder_input(predicted, zero, places))
