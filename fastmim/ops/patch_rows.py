"""Pixels of chosen patches as the rows of a matrix, normalised on the way; a linear map of them is a patch embedding.

Legend: B images, C channels, H W pixels, (p, q) patch, (gh, gw) grid, V = C * p * q values, S sequences of K rows.
"""

from typing import Any

import torch
from torch import Tensor

from fastmim.ops.backends import Backends, compiled
from fastmim.ops.masked_patch_loss import ELEMENTS

__all__ = ["patch_rows", "patch_rows_ref"]

PIXELS = {**ELEMENTS, torch.uint8: 3}  # as csrc/cpu/patch_rows.h numbers them
_backends = Backends(
    "patch_rows", cpu="patch_rows", triton="fastmim.kernels.patch_rows", dtypes={"cpu": ELEMENTS, "triton": ELEMENTS}
)


def patch_rows_ref(
    images: Tensor,
    image_ids: Tensor | None,
    patch_ids: Tensor | None,
    scale_shift: Tensor | None,
    patch: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """What the operation means, in plain PyTorch. Any device, any dtype, differentiable with respect to images."""
    wide = torch.promote_types(dtype, torch.float32)
    image, place = _places(images, image_ids, patch_ids, patch)
    rows = _patches(images, patch)[image, place // (images.shape[3] // patch[1]), place % (images.shape[3] // patch[1])]
    if scale_shift is not None:
        scale, shift = scale_shift.to(wide).view(2, -1, 1, 1)
        rows = rows.to(wide) * scale + shift
    return rows.to(dtype).flatten(2)


def _patches(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """[B, gh, gw, C, p, q], a view."""
    (p, q), (height, width) = patch, images.shape[2:]
    return images.unflatten(3, (width // q, q)).unflatten(2, (height // p, p)).permute(0, 2, 4, 1, 3, 5)


def _places(
    images: Tensor, image_ids: Tensor | None, patch_ids: Tensor | None, patch: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Image and patch of every row, broadcasting to [S, K]."""
    if image_ids is None:
        image_ids = torch.arange(images.shape[0], device=images.device)[:, None]
    if patch_ids is None:
        count = images.shape[2] // patch[0] * (images.shape[3] // patch[1])
        patch_ids = torch.arange(count, device=images.device)[None]
    return image_ids, patch_ids


torch.library.define(
    "fastmim::patch_rows",
    "(Tensor images, Tensor? image_ids, Tensor? patch_ids, Tensor? scale_shift, int p, int q, ScalarType dtype,"
    " str backend) -> Tensor",
)
torch.library.define(
    "fastmim::patch_rows_backward",
    "(Tensor grad_rows, Tensor images, Tensor? image_ids, Tensor? patch_ids, Tensor? scale_shift, int p, int q)"
    " -> Tensor",
)


def _empty(
    images: Tensor, image_ids: Tensor | None, patch_ids: Tensor | None, p: int, q: int, dtype: torch.dtype
) -> Tensor:
    """Rows, not yet written."""
    batch, channels, height, width = images.shape
    ids = image_ids if image_ids is not None else patch_ids
    shape = (batch, (height // p) * (width // q)) if ids is None else ids.shape
    return torch.empty((*shape, channels * p * q), dtype=dtype, device=images.device)


@torch.library.impl("fastmim::patch_rows", ("cpu", "cuda"))
def _forward(
    images: Tensor,
    image_ids: Tensor | None,
    patch_ids: Tensor | None,
    scale_shift: Tensor | None,
    p: int,
    q: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    image_ids, patch_ids, scale_shift = (
        None if tensor is None else tensor.contiguous() for tensor in (image_ids, patch_ids, scale_shift)
    )
    rows = _empty(images, image_ids, patch_ids, p, q, dtype)
    if backend == "triton":
        _backends.triton().patch_rows(images, image_ids, patch_ids, scale_shift, (p, q), rows)
        return rows
    compiled().patch_rows(
        tuple(images.shape),
        (p, q),
        images.data_ptr(),
        PIXELS[images.dtype],
        images.stride(),
        *rows.shape[:2],
        *(0 if tensor is None else tensor.data_ptr() for tensor in (image_ids, patch_ids, scale_shift)),
        rows.data_ptr(),
        ELEMENTS[dtype],
    )
    return rows


@torch.library.impl("fastmim::patch_rows_backward", ("cpu", "cuda"))
def _backward(
    grad_rows: Tensor,
    images: Tensor,
    image_ids: Tensor | None,
    patch_ids: Tensor | None,
    scale_shift: Tensor | None,
    p: int,
    q: int,
) -> Tensor:
    """Only adversaries and image models ask for this; plain PyTorch serves them."""
    wide = torch.promote_types(grad_rows.dtype, torch.float32)
    values = grad_rows.to(wide).unflatten(2, (images.shape[1], p, q))
    if scale_shift is not None:
        values = values * scale_shift[0].to(wide).view(-1, 1, 1)
    gradient = torch.zeros(images.shape, dtype=wide, device=images.device)
    image, place = _places(images, image_ids, patch_ids, (p, q))
    columns = images.shape[3] // q
    _patches(gradient, (p, q)).index_put_((image, place // columns, place % columns), values, accumulate=True)
    return gradient.to(images.dtype)


@torch.library.register_fake("fastmim::patch_rows")
def _fake(
    images: Tensor,
    image_ids: Tensor | None,
    patch_ids: Tensor | None,
    scale_shift: Tensor | None,
    p: int,
    q: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return _empty(images, image_ids, patch_ids, p, q, dtype)


@torch.library.register_fake("fastmim::patch_rows_backward")
def _fake_backward(grad_rows: Tensor, images: Tensor, *others: object) -> Tensor:
    return torch.empty(images.shape, dtype=images.dtype, device=images.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, image_ids, patch_ids, scale_shift, *ctx.patch = inputs[:6]
    ctx.save_for_backward(images, image_ids, patch_ids, scale_shift)


def _differentiate(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.fastmim.patch_rows_backward(grad_rows, *ctx.saved_tensors, *ctx.patch)
    return gradient, *[None] * 7


def _refuse(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("patch_rows: the kernels have no second derivative; use backend='reference' for one")


torch.library.register_autograd("fastmim::patch_rows", _differentiate, setup_context=_save)
torch.library.register_autograd("fastmim::patch_rows_backward", _refuse)


def patch_rows(
    images: Tensor,
    image_ids: Tensor | None,
    patch_ids: Tensor | None,
    scale_shift: Tensor | None,
    patch: tuple[int, int],
    dtype: torch.dtype,
    *,
    backend: str | None = None,
) -> Tensor:
    """Pixels * scale + shift of chosen patches, one patch a row, values in the order (channel, row, column).

    Args:
        images: [B, C, H, W], uint8 or floating point, any strides (a permuted [B, H, W, C] too).
        image_ids: [S, K] int64, the image of each row; None: sequence s is image s, S = B.
        patch_ids: [S, K] int64, its row-major patch; None: row k is patch k, K = gh * gw.
        scale_shift: [2, C] fp32; None takes the pixels as they are.
        patch: (p, q).
        dtype: of the rows; floating point.
        backend: "reference", "cpu" or "triton"; chosen by device when None.

    Returns:
        [S, K, C * p * q], computed in fp32 (fp64 for that dtype). Differentiable with respect to floating images.

    The shapes are what the caller has checked; an index out of range is an error on a CPU.
    """
    device, kind = images.device, dtype if images.dtype == torch.uint8 else torch.promote_types(images.dtype, dtype)
    chosen = _backends.choose(device, kind, backend)
    if chosen == "reference":
        return patch_rows_ref(images, image_ids, patch_ids, scale_shift, patch, dtype)
    return torch.ops.fastmim.patch_rows(images, image_ids, patch_ids, scale_shift, *patch, dtype, chosen)
