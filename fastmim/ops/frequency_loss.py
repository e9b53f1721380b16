"""The Fourier loss of A²MIM, without ever composing an image: one transform of a scaled error.

Legend: B batch, C channels, H W image, (p, q) patch, N = (H/p) * (W/q) cells, row-major; e = prediction - image,
M the mask at pixels, w_f the weight of visible pixels.
"""

import torch
from torch import Tensor

from fastmim.ops.masked_patch_loss import pixel_loss
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


def composed_image(
    prediction: Tensor, image: Tensor, pixels: Tensor, visible_weight: float, replacement: str
) -> Tensor:
    """The image whose spectrum the loss looks at: the prediction where patches were removed, `replacement` elsewhere.

    pixels: bool [B, 1, H, W], True = removed. A share `visible_weight` of the prediction remains at visible pixels.
    """
    if replacement == "target":
        other = image
    elif replacement == "prediction":
        other = prediction.detach()
    elif replacement == "mixed":
        other = 0.5 * prediction.detach() + 0.5 * image
    else:
        other = image.mean(dim=(2, 3), keepdim=True)
    weight = torch.where(pixels, 1.0, visible_weight).to(prediction.dtype)
    return prediction * weight + other * (1 - weight)


def frequency_loss_ref(
    prediction: Tensor,
    image: Tensor,
    mask: Tensor,
    patch_size: PatchSize,
    form: str = "paper",
    focal: bool = True,
    alpha: float = 1.0,
    distance: str = "squared",
    normalise: str = "image_max",
    reduce: str = "mean",
    visible_weight: float = 0.0,
    replacement: str = "target",
    spatial: str = "l1",
) -> Tensor:
    """What the operation means, by its definition: compose, transform both images, compare. Differentiable."""
    p, q = patch_pair(patch_size)
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, image.dtype), torch.float32)
    prediction, image = prediction.to(dtype), image.detach().to(dtype)
    if image.numel() == 0:
        return prediction.sum()
    height, width = image.shape[2:]
    pixels = upsample_mask(mask, (height // p, width // q), (height, width)).unsqueeze(1)
    composed = composed_image(prediction, image, pixels, visible_weight, replacement)
    spectrum, true_spectrum = torch.fft.fft2(composed, norm="ortho"), torch.fft.fft2(image, norm="ortho")
    if form == "code" and focal:
        spectrum, true_spectrum = spectrum.mean(dim=0, keepdim=True), true_spectrum.mean(dim=0, keepdim=True)
    difference = spectrum - true_spectrum
    modulus = difference.abs()
    if form == "code" and not focal:
        value = pixel_loss(modulus, spatial)
    else:
        seen = modulus.detach()
        if form == "code":
            weight = torch.log1p(seen**alpha)
            weight = torch.nan_to_num(weight / weight.max(), nan=0.0).clamp(0, 1)
        else:
            weight = seen ** (alpha if focal else 0.0)
            if normalise == "image_max":
                weight = torch.nan_to_num(weight / weight.amax(dim=(1, 2, 3), keepdim=True), nan=0.0)
        squared = form == "code" or distance == "squared"
        value = weight * ((difference.real**2 + difference.imag**2) if squared else modulus)
    return value.mean() if reduce == "mean" else value.sum(dim=(1, 2, 3)).mean()


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
        "distance": distance,
        "normalise": normalise,
        "reduce": reduce,
        "replacement": replacement,
        "spatial": spatial,
    }
    _check(prediction, image, mask, patch_pair(patch_size), options)
    return frequency_loss_ref(
        prediction,
        image,
        mask,
        patch_size,
        form,
        focal,
        alpha,
        distance,
        normalise,
        reduce,
        visible_weight,
        replacement,
        spatial,
    )


def _check(prediction: Tensor, image: Tensor, mask: Tensor, patch: tuple[int, int], options: dict[str, str]) -> None:
    """Raises ValueError in the caller's terms."""
    (p, q), op = patch, "frequency_loss"
    if image.dim() != 4 or image.shape[2] % p or image.shape[3] % q:
        raise ValueError(
            f"{op}: image must be [B, C, H, W], H and W divisible by the {p} x {q} patch, got {list(image.shape)}"
        )
    if prediction.shape != image.shape:
        raise ValueError(f"{op}: prediction {list(prediction.shape)} and image {list(image.shape)} differ in shape")
    cells = [image.shape[0], (image.shape[2] // p) * (image.shape[3] // q)]
    if list(mask.shape) != cells or mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask must be bool {cells}, got {mask.dtype} {list(mask.shape)}")
    if not (prediction.is_floating_point() and image.is_floating_point()):
        raise ValueError(f"{op}: prediction and image must be floating point, got {prediction.dtype} and {image.dtype}")
    if not prediction.device == image.device == mask.device:
        raise ValueError(
            f"{op}: prediction, image and mask must share a device, got {prediction.device}, {image.device} "
            f"and {mask.device}"
        )
    for name, value in options.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{op}: {name} must be one of {', '.join(CHOICES[name])}, got {value!r}")
    if options["form"] == "code" and (options["distance"], options["normalise"]) != ("squared", "image_max"):
        raise ValueError(
            f"{op}: distance and normalise belong to form 'paper', got {options['distance']!r} and "
            f"{options['normalise']!r} with form 'code'"
        )
