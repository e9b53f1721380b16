"""Reconstruction loss over removed patches, without ever storing the targets.

Legend: B batch, C channels, H W image, (p, q) patch, N = (H/p) * (W/q) patches, row-major.
"""

from typing import Any

import torch
from torch import Tensor

from fastmim.ops.backends import Backends, check_divisible, check_mask, compiled
from fastmim.ops.masks import PatchSize, patch_pair, patchify

__all__ = ["LOSSES", "masked_patch_loss", "masked_patch_loss_ref", "pixel_loss"]

LOSSES = ("l2", "l1", "focal_l1")
VARIANCE_EPS = 1e-6  # under the root, as in MAE
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/cpu/element.h numbers them
_backends = Backends(
    "masked_patch_loss",
    cpu="masked_patch_loss",
    triton="fastmim.kernels.masked_patch_loss",
    dtypes={"cpu": ELEMENTS, "triton": ELEMENTS},
)


def pixel_loss(error: Tensor, loss: str) -> Tensor:
    """Elementwise loss of an error. The focal weight 2 sigmoid(0.2|e|) - 1 of A²MIM is tanh(0.1|e|), which keeps its
    digits where e is small."""
    if loss == "l2":
        return error.square()
    return error.abs() if loss == "l1" else error * torch.tanh(0.1 * error)


def masked_patch_loss_ref(
    prediction: Tensor, image: Tensor, mask: Tensor, patch_size: PatchSize, norm_pix: bool = False, loss: str = "l2"
) -> Tensor:
    """What the operation means, in plain PyTorch. Any device, any dtype, differentiable."""
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, image.dtype), torch.float32)
    target = patchify(image, patch_size).to(dtype)
    if norm_pix:
        centred = target - target.mean(dim=-1, keepdim=True)
        variance = centred.square().sum(dim=-1, keepdim=True) / max(target.shape[-1] - 1, 1)
        target = centred * torch.rsqrt(variance + VARIANCE_EPS)
    rows = prediction if prediction.dim() == 3 else patchify(prediction, patch_size)
    # The mask goes on the error, not on the loss: a visible row may hold anything, and its gradient is zero.
    error = torch.where(mask.unsqueeze(-1), rows.to(dtype) - target.detach(), 0)
    values = mask.sum() * target.shape[-1]
    return pixel_loss(error, loss).sum() / values.clamp(min=1)


torch.library.define(
    "fastmim::masked_patch_loss",
    "(Tensor prediction, Tensor image, Tensor mask, int p, int q, bool norm_pix, str loss, str backend)"
    " -> (Tensor mean_loss, Tensor statistics, Tensor scale)",
)
torch.library.define(
    "fastmim::masked_patch_loss_backward",
    "(Tensor grad_loss, Tensor prediction, Tensor image, Tensor mask, Tensor statistics, Tensor scale, int p, int q,"
    " bool norm_pix, str loss, str backend) -> Tensor",
)


def _outputs(prediction: Tensor, mask: Tensor, norm_pix: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Not yet written: the loss, mean and 1/deviation of every removed patch [B, N, 2] (empty without norm_pix), and
    1 / (number of removed values)."""
    scalar = torch.empty((), dtype=torch.float32, device=prediction.device)
    return scalar, scalar.new_empty((*mask.shape, 2) if norm_pix else (0,)), torch.empty_like(scalar)


@torch.library.impl("fastmim::masked_patch_loss", ("cpu", "cuda"))
def _forward(
    prediction: Tensor, image: Tensor, mask: Tensor, p: int, q: int, norm_pix: bool, loss: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    mask = mask.contiguous()
    mean_loss, statistics, scale = outputs = _outputs(prediction, mask, norm_pix)
    partial = torch.empty_like(mask, dtype=torch.float32)
    if backend == "triton":
        _backends.triton().forward(prediction, image, mask, (p, q), loss, *outputs, partial)
    else:
        compiled().masked_patch_loss(
            _shape(image, p, q),
            _patches(prediction, image, p, q),
            _patches(image, image, p, q),
            mask.data_ptr(),
            norm_pix,
            LOSSES.index(loss),
            statistics.data_ptr(),
            partial.data_ptr(),
            mean_loss.data_ptr(),
            scale.data_ptr(),
        )
    return outputs


@torch.library.impl("fastmim::masked_patch_loss_backward", ("cpu", "cuda"))
def _backward(
    grad_loss: Tensor,
    prediction: Tensor,
    image: Tensor,
    mask: Tensor,
    statistics: Tensor,
    scale: Tensor,
    p: int,
    q: int,
    norm_pix: bool,
    loss: str,
    backend: str,
) -> Tensor:
    mask, grad_loss, gradient = mask.contiguous(), grad_loss.to(torch.float32), torch.empty_like(prediction)
    if backend == "triton":
        _backends.triton().backward(grad_loss, prediction, image, mask, (p, q), loss, statistics, scale, gradient)
    else:
        compiled().prefer_large_pages(gradient.data_ptr(), gradient.nbytes)
        compiled().masked_patch_loss_backward(
            _shape(image, p, q),
            _patches(prediction, image, p, q),
            _patches(image, image, p, q),
            mask.data_ptr(),
            norm_pix,
            LOSSES.index(loss),
            statistics.data_ptr(),
            scale.data_ptr(),
            grad_loss.data_ptr(),
            _patches(gradient, image, p, q),
        )
    return gradient


@torch.library.register_fake("fastmim::masked_patch_loss")
def _fake(
    prediction: Tensor, image: Tensor, mask: Tensor, p: int, q: int, norm_pix: bool, loss: str, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(prediction, mask, norm_pix)


@torch.library.register_fake("fastmim::masked_patch_loss_backward")
def _fake_backward(grad_loss: Tensor, prediction: Tensor, *others: object) -> Tensor:
    return torch.empty_like(prediction)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    prediction, image, mask, *ctx.options = inputs
    _, statistics, scale = output
    ctx.mark_non_differentiable(statistics, scale)
    ctx.save_for_backward(prediction, image, mask, statistics, scale)


def _differentiate(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.fastmim.masked_patch_loss_backward(grad_loss, *ctx.saved_tensors, *ctx.options)
    return gradient, *[None] * 7


def _refuse(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("masked_patch_loss: the kernels have no second derivative; use backend='reference' for one")


torch.library.register_autograd("fastmim::masked_patch_loss", _differentiate, setup_context=_save)
torch.library.register_autograd("fastmim::masked_patch_loss_backward", _refuse)


def _shape(image: Tensor, p: int, q: int) -> tuple[int, ...]:
    """B, H/p, W/q, p, q, C."""
    batch, channels, height, width = image.shape
    return batch, height // p, width // q, p, q, channels


def _patches(tensor: Tensor, image: Tensor, p: int, q: int) -> tuple[int, int, tuple[int, ...]]:
    """Where the pixels of patches lie in an image or in rows of patches, as the kernels take it."""
    return tensor.data_ptr(), ELEMENTS[tensor.dtype], patch_strides(tensor, image.shape[1], image.shape[3] // q, p, q)


def patch_strides(tensor: Tensor, channels: int, grid_columns: int, p: int, q: int) -> tuple[int, ...]:
    """Elements between batches, rows and columns of the grid, rows and columns of a patch, and channels."""
    if tensor.dim() == 3:
        batch, patch, value = tensor.stride()
        return batch, grid_columns * patch, patch, q * channels * value, channels * value, value
    batch, channel, row, column = tensor.stride()
    return batch, p * row, q * column, row, column, channel


def masked_patch_loss(
    prediction: Tensor,
    image: Tensor,
    mask: Tensor,
    patch_size: PatchSize,
    *,
    norm_pix: bool = False,
    loss: str = "l2",
    backend: str | None = None,
) -> Tensor:
    """Mean loss between predicted and true pixels over the removed patches.

    Args:
        prediction: [B, N, p * q * C], patches in MAE's (p, q, c) order, or an image [B, C, H, W]; floating point, any
            strides. Rows of visible patches are not read. The gradient goes here and nowhere else.
        image: [B, C, H, W], floating point, any strides; H and W divisible by the patch.
        mask: [B, N] bool, True = removed = counted. No True at all gives 0.
        patch_size: side of a square patch or (p, q), in pixels.
        norm_pix: targets become (x - mean) / sqrt(unbiased variance + 1e-6) within each patch, all channels together.
        loss: "l2" e², "l1" |e|, or "focal_l1" |e| (2 sigmoid(0.2 |e|) - 1).
        backend: "reference", "cpu" or "triton"; chosen by device when None.

    Returns:
        Scalar, fp32 (fp64 where an input is), accumulated in that precision.

    Raises:
        ValueError: sizes that do not fit, naming both; an unknown loss; or a backend asked for by name that cannot
            run, with its reason.

    Source: MAE (arXiv 2111.06377), SimMIM (arXiv 2111.09886), A²MIM (arXiv 2205.13943; its code for the focal form).
    """
    p, q = patch_pair(patch_size)
    _check(prediction, image, mask, p, q, loss)
    dtype = torch.promote_types(prediction.dtype, image.dtype)
    chosen = _backends.choose(prediction.device, dtype, backend)
    if chosen == "reference":
        return masked_patch_loss_ref(prediction, image, mask, (p, q), norm_pix, loss)
    return torch.ops.fastmim.masked_patch_loss(prediction, image, mask, p, q, norm_pix, loss, chosen)[0]


def _check(prediction: Tensor, image: Tensor, mask: Tensor, p: int, q: int, loss: str) -> None:
    """Raises ValueError in the caller's terms."""
    op = "masked_patch_loss"
    if image.dim() != 4:
        raise ValueError(f"{op}: image must be [B, C, H, W], got {list(image.shape)}")
    batch, channels, height, width = image.shape
    check_divisible(op, height, width, (p, q))
    cells = (height // p) * (width // q)
    rows = (batch, cells, p * q * channels)
    if prediction.shape not in (rows, image.shape):
        raise ValueError(
            f"{op}: prediction must be patches {list(rows)} or an image {list(image.shape)}, "
            f"got {list(prediction.shape)}"
        )
    check_mask(op, mask, batch, cells)
    if not (prediction.is_floating_point() and image.is_floating_point()):
        raise ValueError(f"{op}: prediction and image must be floating point, got {prediction.dtype} and {image.dtype}")
    if not prediction.device == image.device == mask.device:
        raise ValueError(
            f"{op}: prediction, image and mask must share a device, got {prediction.device}, {image.device} "
            f"and {mask.device}"
        )
    if loss not in LOSSES:
        raise ValueError(f"{op}: loss must be one of {', '.join(LOSSES)}, got {loss!r}")
