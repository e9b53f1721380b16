"""Embeds the visible patches of an image, from its pixels as they lie: the pixels of removed patches are never read.

Legend: B batch, C channels, H W image, (p, q) patch, (gh, gw) grid, N = gh * gw patches, row-major, K visible, E width.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmim.ops.backends import Backends, compiled
from fastmim.ops.linear import linear
from fastmim.ops.masked_patch_loss import ELEMENTS
from fastmim.ops.patch_arguments import Statistic, check_patch_embed, rows_dtype, scale_shift_of
from fastmim.ops.patch_rows import patch_rows, patch_rows_ref

__all__ = ["visible_patch_embed", "visible_patch_embed_ref"]

_backends = Backends(
    "visible_patch_embed",
    cpu="add_positions",
    triton="fastmim.kernels.visible_patch_embed",
    dtypes={"cpu": ELEMENTS, "triton": ELEMENTS},
)


def visible_patch_embed_ref(
    images: Tensor,
    ids_keep: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None = None,
    mean: Statistic = None,
    std: Statistic = None,
    layout: str = "nchw",
) -> Tensor:
    """What the operation means, in plain PyTorch. Any device, any dtype, differentiable."""
    images = images if layout == "nchw" else images.permute(0, 3, 1, 2)
    scale_shift = scale_shift_of(images, mean, std, weight.dtype)
    _, _, p, q = weight.shape
    rows = patch_rows_ref(images, None, ids_keep, scale_shift, (p, q), rows_dtype(weight))
    embedded = F.linear(rows, weight.flatten(1), bias)
    if positions is None:
        return embedded
    # Indexing, not gather: its gradient adds up in a fixed order on every device.
    return embedded + (positions if ids_keep is None else positions[ids_keep])


torch.library.define(
    "fastmim::add_positions",
    "(Tensor tokens, Tensor positions, Tensor ids_keep, ScalarType dtype, str backend) -> Tensor",
)
torch.library.define(
    "fastmim::sum_by_position", "(Tensor gradient, Tensor ids_keep, int positions, str backend) -> Tensor"
)


@torch.library.register_fake("fastmim::add_positions")
def _empty_tokens(tokens: Tensor, positions: Tensor, ids_keep: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return tokens.new_empty(tokens.shape, dtype=dtype)


@torch.library.register_fake("fastmim::sum_by_position")
def _empty_positions(gradient: Tensor, ids_keep: Tensor, positions: int, backend: str) -> Tensor:
    return gradient.new_empty((positions, gradient.shape[2]), dtype=torch.float32)


@torch.library.impl("fastmim::add_positions", ("cpu", "cuda"))
def _run_add(tokens: Tensor, positions: Tensor, ids_keep: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    tokens, positions, ids_keep = tokens.contiguous(), positions.contiguous(), ids_keep.contiguous()
    out = _empty_tokens(tokens, positions, ids_keep, dtype, backend)
    if backend == "triton":
        _backends.triton().add_positions(tokens, positions, ids_keep, out)
    else:
        compiled().add_positions(
            (ids_keep.numel(), tokens.shape[2], positions.shape[0]),
            (tokens.data_ptr(), ELEMENTS[tokens.dtype]),
            positions.data_ptr(),
            ids_keep.data_ptr(),
            (out.data_ptr(), ELEMENTS[dtype]),
        )
    return out


@torch.library.impl("fastmim::sum_by_position", ("cpu", "cuda"))
def _run_sum(gradient: Tensor, ids_keep: Tensor, positions: int, backend: str) -> Tensor:
    gradient, ids_keep = gradient.contiguous(), ids_keep.contiguous()
    out = _empty_positions(gradient, ids_keep, positions, backend)
    if backend == "triton":
        _backends.triton().sum_by_position(gradient, ids_keep, out)
    else:
        compiled().sum_by_position(
            (ids_keep.numel(), gradient.shape[2], positions),
            (gradient.data_ptr(), ELEMENTS[gradient.dtype]),
            ids_keep.data_ptr(),
            out.data_ptr(),
        )
    return out


def _save_positions(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, positions, ids_keep, _, ctx.backend = inputs
    ctx.dtype, ctx.count = tokens.dtype, positions.shape[0]
    ctx.save_for_backward(ids_keep)


def _differentiate_add(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (ids_keep,), positions = ctx.saved_tensors, None
    if ctx.needs_input_grad[1]:
        positions = torch.ops.fastmim.sum_by_position(gradient, ids_keep, ctx.count, ctx.backend)
    return gradient.to(ctx.dtype), positions, None, None, None


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gradient, ids_keep, _, _ = inputs
    ctx.dtype = gradient.dtype
    ctx.save_for_backward(ids_keep)


def _differentiate_sum(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (ids_keep,) = ctx.saved_tensors
    return gradient[ids_keep].to(ctx.dtype), None, None, None


torch.library.register_autograd("fastmim::add_positions", _differentiate_add, setup_context=_save_positions)
torch.library.register_autograd("fastmim::sum_by_position", _differentiate_sum, setup_context=_save_sum)


def visible_patch_embed(
    images: Tensor,
    ids_keep: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None = None,
    *,
    mean: Statistic = None,
    std: Statistic = None,
    layout: str = "nchw",
    backend: str | None = None,
) -> Tensor:
    """Patch embedding of the visible patches: normalise, cut out, one linear map, add positions.

    Args:
        images: [B, C, H, W] or, with layout="nhwc", [B, H, W, C]; uint8 or floating point, any strides; H and W
            divisible by the patch.
        ids_keep: [B, K] int64, row-major patch positions in [0, N), as `random_mask` gives them; None takes all
            patches in row-major order.
        weight: [E, C, p, q], as a convolution with stride (p, q) has it.
        bias: [E] or None.
        positions: [N, E], of which the rows of visible patches are added; None adds nothing.
        mean, std: one number a channel, a sequence (cheapest) or a tensor [C]; both or none. Floating-point pixels
            become (x - mean) / std, uint8 pixels (x / 255 - mean) / std. Without them uint8 becomes x / 255.
        layout: "nchw" or "nhwc".
        backend: "reference", "cpu" or "triton"; chosen by device when None.

    Returns:
        [B, K, E] in the dtype of `weight` (autocast's where it is on) or, if wider, of `positions`. Differentiable
        with respect to weight, bias, positions, and images of floating point.

    Raises:
        ValueError: sizes that do not fit, naming both; or a backend asked for by name that cannot run, with its reason.

    Source: MAE (arXiv 2111.06377), section 3; the reference code embeds all patches and drops three quarters.
    """
    _check(images, ids_keep, weight, bias, positions, mean, std, layout)
    row_dtype, (_, _, p, q) = rows_dtype(weight), weight.shape
    floats = [t.dtype for t in (images, positions) if t is not None and t.is_floating_point()]
    chosen = _backends.choose(images.device, reduce(torch.promote_types, floats, row_dtype), backend)
    if chosen == "reference":
        return visible_patch_embed_ref(images, ids_keep, weight, bias, positions, mean, std, layout)
    images = images if layout == "nchw" else images.permute(0, 3, 1, 2)
    scale_shift = scale_shift_of(images, mean, std, weight.dtype)
    rows = patch_rows(images, None, ids_keep, scale_shift, (p, q), row_dtype, backend=chosen)
    embedded = linear(rows, weight.flatten(1), bias)
    if positions is None:
        return embedded
    if ids_keep is None:
        return embedded + positions
    dtype = torch.promote_types(embedded.dtype, positions.dtype)
    return torch.ops.fastmim.add_positions(embedded, positions.float(), ids_keep, dtype, chosen)


def _check(
    images: Tensor,
    ids_keep: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    mean: Statistic,
    std: Statistic,
    layout: str,
) -> None:
    """Raises ValueError in the caller's terms."""
    op = "visible_patch_embed"
    check_patch_embed(op, images, weight, bias, positions, mean, std, layout)
    if ids_keep is None:
        return
    batch = images.shape[0]
    if ids_keep.dim() != 2 or ids_keep.shape[0] != batch or ids_keep.dtype != torch.int64:
        raise ValueError(f"{op}: ids_keep must be int64 [{batch}, K], got {ids_keep.dtype} {list(ids_keep.shape)}")
    if ids_keep.device != images.device:
        raise ValueError(f"{op}: ids_keep is on {ids_keep.device}, images on {images.device}")
