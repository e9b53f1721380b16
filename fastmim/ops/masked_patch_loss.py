"""Reconstruction loss over removed patches, without ever storing the targets.

Legend: B batch, C channels, H W image, (p, q) patch, N = (H/p) * (W/q) patches, row-major.
"""

import torch
from torch import Tensor

from fastmim.ops.masks import PatchSize, patch_pair, patchify

__all__ = ["LOSSES", "masked_patch_loss", "masked_patch_loss_ref", "pixel_loss"]

LOSSES = ("l2", "l1", "focal_l1")
VARIANCE_EPS = 1e-6  # MAE's, under the root


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
    _check(prediction, image, mask, patch_pair(patch_size), loss)
    return masked_patch_loss_ref(prediction, image, mask, patch_size, norm_pix, loss)


def _check(prediction: Tensor, image: Tensor, mask: Tensor, patch: tuple[int, int], loss: str) -> None:
    """Raises ValueError in the caller's terms."""
    (p, q), op = patch, "masked_patch_loss"
    if image.dim() != 4 or image.shape[2] % p or image.shape[3] % q:
        raise ValueError(
            f"{op}: image must be [B, C, H, W], H and W divisible by the {p} x {q} patch, got {list(image.shape)}"
        )
    batch, channels, height, width = image.shape
    cells = (height // p) * (width // q)
    rows = (batch, cells, p * q * channels)
    if tuple(prediction.shape) not in (rows, tuple(image.shape)):
        raise ValueError(
            f"{op}: prediction must be patches {list(rows)} or an image {list(image.shape)}, "
            f"got {list(prediction.shape)}"
        )
    if tuple(mask.shape) != (batch, cells) or mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask must be bool {[batch, cells]}, got {mask.dtype} {list(mask.shape)}")
    if not (prediction.is_floating_point() and image.is_floating_point()):
        raise ValueError(f"{op}: prediction and image must be floating point, got {prediction.dtype} and {image.dtype}")
    if not prediction.device == image.device == mask.device:
        raise ValueError(
            f"{op}: prediction, image and mask must share a device, got {prediction.device}, {image.device} "
            f"and {mask.device}"
        )
    if loss not in LOSSES:
        raise ValueError(f"{op}: loss must be one of {', '.join(LOSSES)}, got {loss!r}")
