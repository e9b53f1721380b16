"""The first attention over a sequence whose removed positions hold a mask token.

There, before anything is mixed, a removed position knows nothing of its image: its vector is the mask token, plus the
position's embedding where there is one. So its LayerNorm and projection are computed once for the batch, not once for
every image. Without absolute positions all removed positions of an image hold one vector, and as keys they can be one
key that counts for all. Both are exact.

Legend: B batch, P prefix tokens, K visible patches, N all patches, T = P + N tokens, C width, H heads, D head width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmim.layers.fused_attention import FusedAttention
from fastmim.layers.fused_beit import FusedBeitAttention
from fastmim.layers.row_index import inverse_permutation
from fastmim.ops import attention, decoder_input

__all__ = ["assemble", "collapsed_bias", "mask_token_attention", "sequence_of"]


def mask_token_attention(
    norm: nn.Module,
    attn: FusedAttention | FusedBeitAttention,
    visible: Tensor,
    mask_token: Tensor,
    ids_restore: Tensor,
    *,
    num_prefix_tokens: int = 0,
    bias: Tensor | None = None,
    collapse_keys: bool = False,
) -> Tensor:
    """`attn(norm(sequence))` for the sequence `decoder_input(visible, mask_token, ids_restore)`, with no work repeated.

    Args:
        norm, attn: of a block; `norm` acts on each row by itself, as LayerNorm does.
        visible: [B, P + K, C], prefix tokens and visible patches, with their positions added if they have any.
        mask_token: the vector of each removed position: [C] for all, [N, C] where positions are added, the same in all
            images, or [B, 1, C] where each image has its own.
        ids_restore: [B, N] int64, as `random_mask` gives it.
        num_prefix_tokens: P.
        bias: [1, H, T, T], added to the scores, or None.
        collapse_keys: also let one key stand for all removed positions, which needs a mask token [C] or [B, 1, C];
            our attention then runs, whatever the provider of `attn`.

    Returns:
        [B, P + N, C]. Stochastic depth, gain and residual sum come after attention and are not touched by this.

    Raises:
        ValueError: keys to be collapsed that are not equal.
    """
    if isinstance(attn, FusedAttention) and attn.gate is not None:  # the gate reads the rows of the sequence
        return attn(norm(assemble(visible, mask_token, ids_restore, num_prefix_tokens)), bias)
    of_visible = attn.project(norm(visible))  # [B, P + K, 3, H, D]
    of_masked = attn.project(norm(mask_token.to(visible.dtype)))  # [3, H, D], [N, 3, H, D] or [B, 1, 3, H, D]
    if collapse_keys:
        if mask_token.dim() == 2:
            raise ValueError(
                f"mask_token_attention: removed positions with vectors of their own (mask_token "
                f"{list(mask_token.shape)}) are not one key; collapse_keys needs a mask token [{mask_token.shape[-1]}]"
            )
        attended = _with_one_key(attn, of_visible, of_masked, ids_restore, num_prefix_tokens, bias)
    else:
        packed = assemble(of_visible.flatten(2), of_masked.flatten(-3), ids_restore, num_prefix_tokens)
        attended = attn.attend(packed.unflatten(2, of_visible.shape[2:]), bias)
    return attn.finish(attended, attended) if isinstance(attn, FusedAttention) else attn.finish(attended)


def assemble(
    visible: Tensor,
    mask_token: Tensor,
    ids_restore: Tensor,
    num_prefix_tokens: int,
    positions: Tensor | None = None,
) -> Tensor:
    """`decoder_input` of `visible`, for a mask token [C] or [N, C], or [B, 1, C] that is each image's own.

    positions [N, C] are added to removed positions only.
    """
    if mask_token.dim() < 3:
        token = mask_token if positions is None else mask_token + positions
        return sequence_of(decoder_input(visible, token, ids_restore, num_prefix_tokens=num_prefix_tokens))
    token = mask_token.new_zeros(mask_token.shape[2]) if positions is None else positions
    x = sequence_of(decoder_input(visible, token, ids_restore, num_prefix_tokens=num_prefix_tokens))
    removed = ids_restore >= visible.shape[1] - num_prefix_tokens
    removed = F.pad(removed, (num_prefix_tokens, 0))
    return torch.addcmul(x, mask_token.to(x.dtype), removed.unsqueeze(-1).to(x.dtype))


def sequence_of(assembled: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """What `decoder_input` gives where no norm was asked for."""
    assert isinstance(assembled, Tensor)
    return assembled


def _with_one_key(
    attn: FusedAttention | FusedBeitAttention,
    of_visible: Tensor,
    of_masked: Tensor,
    ids_restore: Tensor,
    prefix: int,
    bias: Tensor | None,
) -> Tensor:
    """Queries of all T positions, keys of the P + K visible ones and of one removed."""
    batch, shown = of_visible.shape[:2]
    removed = prefix + ids_restore.shape[1] - shown
    queries = assemble(of_visible[:, :, 0].flatten(2), of_masked[..., 0, :, :].flatten(-2), ids_restore, prefix)
    keys = torch.cat((of_visible[:, :, 1:], of_masked[..., 1:, :, :].expand(batch, 1, -1, -1, -1)), dim=1)
    log_count = None
    if bias is None:
        dtype = torch.promote_types(keys.dtype, torch.float32)
        log_count = torch.zeros(batch, shown + 1, dtype=dtype, device=keys.device)
        log_count[:, -1] = math.log(removed) if removed else -math.inf
    else:
        bias = collapsed_bias(bias, ids_restore, shown - prefix, prefix)
    return attention(queries.unflatten(2, of_visible.shape[3:]), keys, bias, log_count, scale=attn.scale)


def collapsed_bias(bias: Tensor, ids_restore: Tensor, num_visible: int, num_prefix_tokens: int) -> Tensor:
    """The bias of every query towards visible keys, and the logarithm of the sum of exponentials towards removed ones.

    Args:
        bias: [1, H, T, T], with T = P + N.
        ids_restore: [B, N].
        num_visible: K.
        num_prefix_tokens: P.

    Returns:
        [B, H, T, P + K + 1], keys in the order of the visible sequence.
    """
    batch, prefix = ids_restore.shape[0], num_prefix_tokens
    ids = prefix + inverse_permutation(ids_restore)[:, :num_visible]
    kept = torch.cat((torch.arange(prefix, device=ids.device).expand(batch, -1), ids), dim=1)  # [B, P + K]
    # Indexing, not gather: its gradient adds up in a fixed order on every device.
    columns = bias[0].permute(2, 0, 1)[kept].permute(0, 2, 3, 1)  # [B, H, T, P + K]
    largest = bias.detach().amax(dim=-1, keepdim=True)  # [1, H, T, 1]
    removed = (ids_restore >= num_visible).to(bias.dtype)
    total = torch.einsum("hqk,bk->bhq", (bias - largest)[0, :, :, prefix:].exp(), removed)
    together = total.clamp_min(torch.finfo(bias.dtype).tiny).log().unsqueeze(-1) + largest
    return torch.cat((columns, together), dim=-1)
