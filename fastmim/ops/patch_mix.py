"""Mixes the patches of a group of images into one sequence, or into as many as there are images, and embeds them.

Legend: B images in groups of G, S = B / G groups, (p, q) patch, L = gh * gw positions, E width, M [S, L] mixing map.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmim.ops.backends import Backends
from fastmim.ops.linear import linear
from fastmim.ops.masked_patch_loss import ELEMENTS
from fastmim.ops.patch_arguments import Statistic, check_patch_embed, rows_dtype, scale_shift_of
from fastmim.ops.patch_rows import patch_rows, patch_rows_ref

__all__ = ["image_of_position", "patch_mix", "patch_mix_ref"]

_backends = Backends(
    "patch_mix", cpu="patch_rows", triton="fastmim.kernels.patch_rows", dtypes={"cpu": ELEMENTS, "triton": ELEMENTS}
)


def image_of_position(segments: Tensor, group_size: int, full: bool = False) -> Tensor:
    """Number in the batch of the image that each position shows: [S, L], or [B, L] in full mixing."""
    first = torch.arange(segments.shape[0], device=segments.device)[:, None] * group_size
    if not full:
        return first + segments
    shift = torch.arange(group_size, device=segments.device)[:, None]
    return (first[:, None] + (segments[:, None] + shift) % group_size).flatten(0, 1)


def patch_mix_ref(
    images: Tensor,
    segments: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None = None,
    mean: Statistic = None,
    std: Statistic = None,
    layout: str = "nchw",
    full: bool = False,
) -> Tensor:
    """What the operation means, in plain PyTorch. Any device, any dtype, differentiable."""
    images = images if layout == "nchw" else images.permute(0, 3, 1, 2)
    image_ids = image_of_position(segments, images.shape[0] // max(segments.shape[0], 1), full)
    scale_shift = scale_shift_of(images, mean, std, weight.dtype)
    _, _, p, q = weight.shape
    rows = patch_rows_ref(images, image_ids, None, scale_shift, (p, q), rows_dtype(weight))
    embedded = F.linear(rows, weight.flatten(1), bias)
    return embedded if positions is None else embedded + positions


def patch_mix(
    images: Tensor,
    segments: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None = None,
    *,
    mean: Statistic = None,
    std: Statistic = None,
    layout: str = "nchw",
    full: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Patch embedding of mixed images: position l shows patch l of the image that the map names. No patch moves.

    Patches do not overlap, so mixing pixels and mixing embeddings are the same; only the pixels that a sequence shows
    are read, normalised and multiplied, and no mixed image is ever stored.

    Args:
        images: [B, C, H, W] or, with layout="nhwc", [B, H, W, C]; uint8 or floating point, any strides; H and W
            divisible by the patch. Image b is number b % G of group b // G.
        segments: [S, L] int64 in [0, G), the map M of each group, as `mixing_map` gives it; G = B / S.
        weight: [E, C, p, q], as a convolution with stride (p, q) has it.
        bias: [E] or None.
        positions: [L, E], added to every sequence; None adds nothing.
        mean, std: one number a channel, a sequence (cheapest) or a tensor [C]; both or none. Floating-point pixels
            become (x - mean) / std, uint8 pixels (x / 255 - mean) / std. Without them uint8 becomes x / 255.
        layout: "nchw" or "nhwc".
        full: G sequences a group instead of one; sequence j of a group has the map (M + j) mod G, so that together
            they show every patch of every image once.
        backend: "reference", "cpu" or "triton"; chosen by device when None.

    Returns:
        [S, L, E], or [B, L, E] with `full`, in the dtype of `weight` (autocast's where it is on) or, if wider, of
        `positions`. Differentiable with respect to weight, bias, positions, and images of floating point.

    Raises:
        ValueError: sizes that do not fit, naming both; a batch that is not a whole number of groups; or a backend
            asked for by name that cannot run, with its reason.

    Source: MixedAE (arXiv 2303.17152): "compose"; with `full` the mixing of MixMIM (arXiv 2205.13137).
    """
    group_size = _check(images, segments, weight, bias, positions, mean, std, layout)
    dtype = rows_dtype(weight)
    kind = torch.promote_types(images.dtype, dtype) if images.is_floating_point() else dtype
    chosen = _backends.choose(images.device, kind, backend)
    if chosen == "reference":
        return patch_mix_ref(images, segments, weight, bias, positions, mean, std, layout, full)
    images = images if layout == "nchw" else images.permute(0, 3, 1, 2)
    scale_shift = scale_shift_of(images, mean, std, weight.dtype)
    image_ids = image_of_position(segments, group_size, full)
    _, _, p, q = weight.shape
    rows = patch_rows(images, image_ids, None, scale_shift, (p, q), dtype, backend=chosen)
    embedded = linear(rows, weight.flatten(1), bias)
    return embedded if positions is None else embedded + positions


def _check(
    images: Tensor,
    segments: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    mean: Statistic,
    std: Statistic,
    layout: str,
) -> int:
    """G. Raises ValueError in the caller's terms."""
    op = "patch_mix"
    patches = check_patch_embed(op, images, weight, bias, positions, mean, std, layout)
    if segments.dim() != 2 or segments.shape[1] != patches or segments.dtype != torch.int64:
        raise ValueError(
            f"{op}: segments must be int64 [B / G, {patches}] for {patches} patches of an image, got {segments.dtype} "
            f"{list(segments.shape)}"
        )
    if segments.device != images.device:
        raise ValueError(f"{op}: segments are on {segments.device}, images on {images.device}")
    batch, groups = images.shape[0], segments.shape[0]
    if groups == 0:
        if batch:
            raise ValueError(f"{op}: {batch} images and no mixing map")
        return 1
    if batch % groups:
        raise ValueError(f"{op}: {batch} images do not divide among the {groups} mixing maps of segments")
    return batch // groups
