"""Takes mixed sequences apart: one decoder sequence for each image, mask tokens where it does not show.

Legend: B images in groups of G, S = B / G mixed sequences, P prefix tokens, L positions, E width.
"""

import torch
from torch import Tensor

from fastmim.ops.backends import Backends
from fastmim.ops.decoder_input import decoder_input, decoder_input_ref
from fastmim.ops.masked_patch_loss import ELEMENTS

__all__ = ["unmix", "unmix_ref"]

_backends = Backends(
    "unmix",
    cpu="decoder_input",
    triton="fastmim.kernels.decoder_input",
    dtypes={"cpu": ELEMENTS, "triton": ELEMENTS},
)


def _places(segments: Tensor, group_size: int) -> Tensor:
    """[B, L]: the position itself where an image shows, L elsewhere; what decoder_input calls ids_restore."""
    length = segments.shape[1]
    images = torch.arange(group_size, device=segments.device)[:, None]
    places = torch.arange(length, device=segments.device)
    return torch.where(segments[:, None] == images, places, length).flatten(0, 1)


def unmix_ref(
    mixed: Tensor,
    segments: Tensor,
    group_size: int,
    mask_token: Tensor,
    positions: Tensor | None = None,
    num_prefix_tokens: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """What the operation means, in plain PyTorch. Any device, any dtype, differentiable."""
    places = _places(segments, group_size)
    return decoder_input_ref(
        mixed, mask_token, places, positions, num_prefix_tokens, norm_weight, norm_bias, eps, group_size
    )


def unmix(
    mixed: Tensor,
    segments: Tensor,
    group_size: int,
    mask_token: Tensor,
    positions: Tensor | None = None,
    *,
    num_prefix_tokens: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Decoder sequences of all images of a group from their one mixed sequence, and the LayerNorm that comes next.

    Image g holds the mixed token at the positions where segments is g and the mask token at all others; prefix tokens
    go to every image of the group. One pass of `decoder_input`'s kernel, whatever the counts of positions.

    Args:
        mixed: [S, P + L, E], floating point, any strides: prefix tokens, then the tokens of a mixed sequence.
        segments: [S, L] int64, which image of the group a position shows, as `mixing_map` gives it.
        group_size: G.
        mask_token: [E], or [L, E] where each place has a token of its own.
        positions: [P + L, E], added to every image; None adds nothing.
        num_prefix_tokens: P (cls, registers); their gradient is the sum over the group.
        norm_weight, norm_bias, eps, backend: as `decoder_input` takes them.

    Returns:
        [B, P + L, E] with image b = number b % G of group b // G; with `norm_weight` the pair (sequence, LayerNorm of
        it). Types as `decoder_input`. Differentiable with respect to everything but `segments`.

    Raises:
        ValueError: sizes that do not fit, naming both; or a backend asked for by name that cannot run, with its reason.

    Source: MixedAE (arXiv 2303.17152), unmixing before the decoder.
    """
    if mixed.dim() != 3 or segments.shape != (mixed.shape[0], mixed.shape[1] - num_prefix_tokens):
        raise ValueError(
            f"unmix: segments {list(segments.shape)} do not fit mixed {list(mixed.shape)} with {num_prefix_tokens} "
            f"prefix tokens; expected [S, P + L, E] and [S, L]"
        )
    if segments.dtype != torch.int64 or group_size < 1:
        raise ValueError(
            f"unmix: segments must be int64 and group_size at least 1, got {segments.dtype} and {group_size}"
        )
    dtype = mixed.dtype if positions is None else torch.promote_types(mixed.dtype, positions.dtype)
    chosen = _backends.choose(mixed.device, dtype, backend)
    return decoder_input(
        mixed,
        mask_token,
        _places(segments, group_size),
        positions,
        num_prefix_tokens=num_prefix_tokens,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        eps=eps,
        group_size=group_size,
        backend=chosen,
    )
