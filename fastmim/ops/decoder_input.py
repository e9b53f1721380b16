"""What a decoder starts from: visible tokens at their places, a mask token everywhere else, positions added.

Legend: B batch, in groups of G with the same visible tokens, P prefix tokens, K visible patches, N all patches,
T = P + N tokens, E width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmim.ops.decoder_input_operators import decoder_input_backends

__all__ = ["decoder_input", "decoder_input_ref"]


def decoder_input_ref(
    visible: Tensor,
    mask_token: Tensor,
    ids_restore: Tensor,
    positions: Tensor | None = None,
    num_prefix_tokens: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """What the operation means, in plain PyTorch. Any device, any dtype, differentiable."""
    dtype = _sequence_dtype(visible, positions)
    prefix, patches = visible.to(dtype).tensor_split((num_prefix_tokens,), dim=1)
    prefix = prefix.repeat_interleave(group_size, dim=0)
    count = patches.shape[1]
    rows = mask_token.to(dtype).expand(*ids_restore.shape, -1)
    if count:
        # Indexing, not gather: its gradient adds up in a fixed order on every device.
        group = (torch.arange(ids_restore.shape[0], device=visible.device) // group_size).unsqueeze(1)
        shown = (ids_restore < count).unsqueeze(-1)
        rows = torch.where(shown, patches[group, ids_restore.clamp(max=count - 1)], rows)
    sequence = torch.cat((prefix, rows), dim=1)
    if positions is not None:
        sequence = sequence + positions.to(dtype)
    if norm_weight is None:
        return sequence
    bias = None if norm_bias is None else norm_bias.to(dtype)
    normed = F.layer_norm(sequence, sequence.shape[-1:], norm_weight.to(dtype), bias, eps)
    return sequence, normed.to(_normed_dtype(sequence.device, dtype))


def decoder_input(
    visible: Tensor,
    mask_token: Tensor,
    ids_restore: Tensor,
    positions: Tensor | None = None,
    *,
    num_prefix_tokens: int = 0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int = 1,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Visible tokens back at their places among mask tokens, plus positions, and the LayerNorm that comes next.

    Args:
        visible: [B / G, P + K, E], floating point, any strides: prefix tokens, then the visible patches in MAE's order.
        mask_token: [E], or [N, E] where each place has a token of its own.
        ids_restore: [B, N] int64, a permutation of 0 .. N - 1 in each image, as `random_mask` gives it: place l holds
            visible patch ids_restore[b, l] where that is below K, else the mask token.
            With `group_size` a patch is shown by at most one image of its group, and ids from K on may repeat.
        positions: [P + N, E], added to every image; None adds nothing.
        num_prefix_tokens: P, tokens in front that keep their places (cls, registers).
        norm_weight, norm_bias: [E]; with a weight, LayerNorm of the sequence is computed in the same pass.
        eps: of the LayerNorm.
        group_size: G, neighbouring images of the batch that share the same visible tokens (a mixed sequence).
        backend: "reference", "cpu" or "triton"; chosen by device when None.

    Returns:
        The sequence [B, P + N, E], in the dtype of `visible` or, if wider, of `positions`; with `norm_weight` the pair
        (sequence, LayerNorm of it), the latter in autocast's dtype where autocast is on. Differentiable with respect
        to everything but `ids_restore`.

    Raises:
        ValueError: sizes that do not fit, naming both; or a backend asked for by name that cannot run, with its reason.

    Source: MAE (arXiv 2111.06377), section 3, "MAE decoder".
    """
    _check(visible, mask_token, ids_restore, positions, num_prefix_tokens, norm_weight, norm_bias, group_size)
    dtype = _sequence_dtype(visible, positions)
    chosen = decoder_input_backends.choose(visible.device, dtype, backend)
    if chosen == "reference":
        return decoder_input_ref(
            visible, mask_token, ids_restore, positions, num_prefix_tokens, norm_weight, norm_bias, eps, group_size
        )
    floats = (None if t is None else t.float() for t in (positions, norm_weight, norm_bias))
    sequence, normed = torch.ops.fastmim.decoder_input(
        visible, mask_token.float(), ids_restore, *floats, num_prefix_tokens, group_size, eps, dtype,
        _normed_dtype(visible.device, dtype), chosen,
    )  # fmt: skip
    return sequence if norm_weight is None else (sequence, normed)


def _sequence_dtype(visible: Tensor, positions: Tensor | None) -> torch.dtype:
    return visible.dtype if positions is None else torch.promote_types(visible.dtype, positions.dtype)


def _normed_dtype(device: torch.device, sequence: torch.dtype) -> torch.dtype:
    """What the linear map after the norm would be given under autocast; else as the sequence."""
    if device.type != "meta" and torch.is_autocast_enabled(device.type) and sequence != torch.float64:
        return torch.get_autocast_dtype(device.type)
    return sequence


def _check(
    visible: Tensor,
    mask_token: Tensor,
    ids_restore: Tensor,
    positions: Tensor | None,
    num_prefix_tokens: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    group_size: int,
) -> None:
    """Raises ValueError in the caller's terms."""
    op = "decoder_input"
    if visible.dim() != 3:
        raise ValueError(f"{op}: visible must be [B, P + K, E], got {list(visible.shape)}")
    groups, tokens, width = visible.shape
    if group_size < 1:
        raise ValueError(f"{op}: group_size is {group_size}, at least 1 is needed")
    batch = groups * group_size
    if not 0 <= num_prefix_tokens <= tokens:
        raise ValueError(f"{op}: {num_prefix_tokens} prefix tokens do not fit visible {list(visible.shape)}")
    if ids_restore.dim() != 2 or ids_restore.shape[0] != batch or ids_restore.dtype != torch.int64:
        raise ValueError(
            f"{op}: ids_restore must be int64 [{batch}, N], got {ids_restore.dtype} {list(ids_restore.shape)}"
        )
    patches = ids_restore.shape[1]
    if tokens - num_prefix_tokens > patches:
        raise ValueError(
            f"{op}: {tokens - num_prefix_tokens} visible patches are more than the {patches} places of ids_restore"
        )
    if mask_token.shape not in ((width,), (patches, width)):
        raise ValueError(
            f"{op}: mask_token must be [{width}] or [{patches}, {width}] for visible {list(visible.shape)}, "
            f"got {list(mask_token.shape)}"
        )
    if positions is not None and positions.shape != (num_prefix_tokens + patches, width):
        raise ValueError(
            f"{op}: positions must be [{num_prefix_tokens + patches}, {width}] ({num_prefix_tokens} prefix tokens and "
            f"{patches} patches), got {list(positions.shape)}"
        )
    if norm_bias is not None and norm_weight is None:
        raise ValueError(f"{op}: norm_bias is given without norm_weight, which is what asks for the norm")
    named = {"visible": visible, "mask_token": mask_token, "positions": positions}
    named |= {"norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if name.startswith("norm") and tensor.shape != (width,):
            raise ValueError(f"{op}: {name} must be [{width}], as visible has channels, got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
        if tensor.device != ids_restore.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, ids_restore on {ids_restore.device}")
