"""The Fourier loss of A²MIM, without ever composing an image: one transform of a scaled error.

Legend: B batch, C channels, H W image, R = W//2 + 1 columns of a half spectrum, (p, q) cell of the mask,
N = (H/p) * (W/q) cells, row-major; w_f the weight of visible pixels.

A removed pixel shows the prediction, a visible one w_f * prediction + (1 - w_f) * replacement. By linearity the
difference of spectra is the spectrum of the difference of images, and that is the error e = prediction - image times a
constant on visible pixels:

    replacement   constant           also added
    target        w_f
    prediction    1
    mixed         (1 + w_f) / 2
    mean          w_f                (1 - w_f) * (mean of the image - image)

Gradient reaches a visible pixel with weight w_f in every case. Spectra of real images are symmetric, so half of the
columns are transformed, and all but the first (and W/2, where W is even) count twice.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmim.ops.backends import Backends, check_divisible, check_mask
from fastmim.ops.masked_patch_loss import ELEMENTS, pixel_loss
from fastmim.ops.masks import PatchSize, patch_pair, upsample_mask

__all__ = ["frequency_loss", "frequency_loss_ref"]

CHOICES = {
    "form": ("paper", "code"),
    "distance": ("squared", "modulus"),
    "normalise": ("image_max", "none"),
    "reduce": ("mean", "sum"),
    "replacement": ("target", "prediction", "mixed", "mean"),
    "spatial": ("l1", "focal_l1"),
}
KINDS = ("squared", "modulus", "log", "l1", "focal_l1")
_backends = Backends(
    "frequency_loss",
    cpu="frequency_error",
    triton="fastmim.kernels.frequency_loss",
    dtypes={"cpu": ELEMENTS, "triton": ELEMENTS},
)


class Plan(NamedTuple):
    """What the options come to."""

    kind: str
    """One of KINDS: |D|^exponent * |D|^2, |D|^exponent * |D|, log(1 + |D|^exponent) * |D|^2, or a loss of |D|."""
    exponent: float
    normalise: bool
    """Divide the weights by their maximum, in each transformed image."""
    average: bool
    """Transform the mean over the batch, one image for all."""
    factor: float
    """The constant of the table above."""
    mean_weight: float
    """What the mean image is added with."""
    visible_weight: float
    mean: bool
    """Mean over channels and frequencies, else their sum."""


def plan(
    form: str = "paper",
    focal: bool = True,
    alpha: float = 1.0,
    distance: str = "squared",
    normalise: str = "image_max",
    reduce: str = "mean",
    visible_weight: float = 0.0,
    replacement: str = "target",
    spatial: str = "l1",
) -> Plan:
    """Reads the options of `frequency_loss`, which documents them."""
    if form == "paper":
        kind = distance
    else:
        kind = "log" if focal else spatial
    return Plan(
        kind,
        alpha if focal else 0.0,
        kind == "log" or (form == "paper" and normalise == "image_max"),
        kind == "log",
        {"prediction": 1.0, "mixed": 0.5 * (1 + visible_weight)}.get(replacement, visible_weight),
        1 - visible_weight if replacement == "mean" else 0.0,
        visible_weight,
        reduce == "mean",
    )


def frequency_loss_ref(
    prediction: Tensor, image: Tensor, mask: Tensor, patch_size: PatchSize, **options: Any
) -> Tensor:
    """What the operation means, in plain PyTorch. Any device and dtype; differentiable once."""
    p, q = patch_pair(patch_size)
    how = plan(**options)
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, image.dtype), torch.float32)
    prediction, image = prediction.to(dtype), image.detach().to(dtype)
    if image.numel() == 0:
        return prediction.sum()
    channels, height, width = image.shape[1:]
    removed = upsample_mask(mask, (height // p, width // q), (height, width)).unsqueeze(1)

    error = prediction - image
    frozen = error.detach()
    visible = 0 if how.factor == 0 else how.factor * frozen + how.visible_weight * (error - frozen)
    error = torch.where(removed, error, visible)
    if how.mean_weight:
        error = error + torch.where(removed, 0, how.mean_weight * (image.mean(dim=(2, 3), keepdim=True) - image))
    if how.average:
        error = error.mean(dim=0, keepdim=True)

    spectrum = torch.fft.rfft2(error, norm="ortho")
    modulus = spectrum.abs()
    if how.kind in ("l1", "focal_l1"):
        value = pixel_loss(modulus, how.kind)
    else:
        weight = modulus.detach() ** how.exponent
        if how.kind == "log":
            weight = torch.log1p(weight)
        if how.normalise:
            weight = torch.nan_to_num(weight / weight.amax(dim=(1, 2, 3), keepdim=True), nan=0.0)
        value = weight * (modulus if how.kind == "modulus" else spectrum.real**2 + spectrum.imag**2)
    total = (value * column_counts(width, value)).sum() / value.shape[0]
    return total / (channels * height * width) if how.mean else total


def column_counts(width: int, like: Tensor) -> Tensor:
    """[R]: how often a column of the half spectrum stands in the whole one."""
    column = torch.arange(width // 2 + 1, device=like.device)
    return torch.where((column == 0) | (2 * column == width), 1, 2).to(like.dtype)


def frequency_loss(
    prediction: Tensor,
    image: Tensor,
    mask: Tensor,
    patch_size: PatchSize,
    *,
    form: str = "paper",
    focal: bool = True,
    alpha: float = 1.0,
    distance: str = "squared",
    normalise: str = "image_max",
    reduce: str = "mean",
    visible_weight: float = 0.0,
    replacement: str = "target",
    spatial: str = "l1",
    backend: str | None = None,
) -> Tensor:
    """Distance between the spectra of the composed image and of the true one.

    Args:
        prediction: [B, C, H, W], floating point, any strides. The gradient goes here and nowhere else.
        image: [B, C, H, W], floating point, any strides; H and W divisible by the patch.
        mask: [B, N] bool, True = removed.
        patch_size: side of a square cell of the mask or (p, q), in pixels.
        form: "paper", every image by itself; or "code", what the authors' program computes: with `focal` the spectra
            are averaged over the batch before they are compared, so errors of opposite sign in different images
            cancel, and the loss depends on the batch of this process.
        focal: weight every frequency by how wrong it is (no gradient through the weight). The weight is |difference|
            to the power `alpha` in the paper's form and log(1 + |difference|^alpha) over its maximum in the code's.
        alpha: that exponent.
        distance: "squared" or "modulus" of the difference. Paper's form only. With "modulus", alpha 1 and normalise
            "none" the gradient is exactly that of half the squared error at pixels.
        normalise: "image_max" divides the weights by their maximum in each image; "none". Paper's form only.
        reduce: "mean" or "sum" over channels and frequencies; always the mean over images.
        visible_weight: share w_f of the prediction that is kept at visible pixels, and of its gradient there.
        replacement: what stands at visible pixels, without gradient: "target", "prediction", "mixed" (half each) or
            "mean" (the image's mean colour).
        spatial: "l1" or "focal_l1", the loss on the modulus in the code's form without `focal`.
        backend: "reference", "cpu" or "triton"; chosen by device when None.

    Returns:
        Scalar, fp32 (fp64 where an input is); transforms and sums in that precision whatever the inputs.

    Raises:
        ValueError: sizes that do not fit, naming both; an unknown choice; or a backend asked for by name that cannot
            run, with its reason.

    Source: A²MIM (arXiv 2205.13943), equation of its Fourier loss, and the authors' program.
    """
    options = {
        "form": form,
        "focal": focal,
        "alpha": alpha,
        "distance": distance,
        "normalise": normalise,
        "reduce": reduce,
        "visible_weight": visible_weight,
        "replacement": replacement,
        "spatial": spatial,
    }
    p, q = patch_pair(patch_size)
    _check(prediction, image, mask, p, q, options)
    return frequency_loss_ref(prediction, image, mask, (p, q), **options)


def _check(prediction: Tensor, image: Tensor, mask: Tensor, p: int, q: int, options: dict[str, Any]) -> None:
    """Raises ValueError in the caller's terms."""
    op = "frequency_loss"
    if image.dim() != 4 or prediction.shape != image.shape:
        raise ValueError(
            f"{op}: prediction and image must be [B, C, H, W] of one shape, "
            f"got {list(prediction.shape)} and {list(image.shape)}"
        )
    batch, _, height, width = image.shape
    check_divisible(op, height, width, (p, q))
    check_mask(op, mask, batch, (height // p) * (width // q))
    if not (prediction.is_floating_point() and image.is_floating_point()):
        raise ValueError(f"{op}: prediction and image must be floating point, got {prediction.dtype} and {image.dtype}")
    if not prediction.device == image.device == mask.device:
        raise ValueError(
            f"{op}: prediction, image and mask must share a device, got {prediction.device}, {image.device} "
            f"and {mask.device}"
        )
    for name, known in CHOICES.items():
        if options[name] not in known:
            raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {options[name]!r}")
    if options["form"] == "code" and (options["distance"], options["normalise"]) != ("squared", "image_max"):
        raise ValueError(
            f"{op}: distance and normalise belong to form 'paper', got {options['distance']!r} and "
            f"{options['normalise']!r} with form 'code'"
        )
    if options["alpha"] < 0:
        raise ValueError(f"{op}: alpha must not be negative, got {options['alpha']}")
    if not 0 <= options["visible_weight"] <= 1:
        raise ValueError(f"{op}: visible_weight must be from 0 to 1, got {options['visible_weight']}")
