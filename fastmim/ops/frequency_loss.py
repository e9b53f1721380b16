"""The Fourier loss of A²MIM, without ever composing an image: one transform of a scaled error.

Legend: B batch, C channels, H W image, R = W//2 + 1 columns of a half spectrum, (p, q) cell of the mask,
N = (H/p) * (W/q) cells, row-major; w_f the weight of visible pixels.

`fastmim.ops.frequency_plan` says why one transform is enough. Spectra of real images are symmetric, so half of the
columns are transformed, and all but the first (and W/2, where W is even) count twice.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastmim.ops.backends import Backends, check_divisible, check_mask, compiled
from fastmim.ops.frequency_plan import CHOICES, KINDS, Plan, plan
from fastmim.ops.masked_patch_loss import ELEMENTS, pixel_loss
from fastmim.ops.masks import PatchSize, patch_pair, upsample_mask

__all__ = ["frequency_loss", "frequency_loss_ref"]

_backends = Backends(
    "frequency_loss",
    cpu="frequency_error",
    triton="fastmim.kernels.frequency_loss",
    dtypes={"cpu": ELEMENTS, "triton": ELEMENTS},
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


_OPTIONS = (
    "str form, bool focal, float alpha, str distance, str normalise, str reduce, float visible_weight,"
    " str replacement, str spatial, str backend"
)
torch.library.define(
    "fastmim::frequency_loss",
    f"(Tensor prediction, Tensor image, Tensor mask, int p, int q, {_OPTIONS})"
    " -> (Tensor loss, Tensor gradient_spectrum, Tensor factor)",
)
torch.library.define(
    "fastmim::frequency_loss_backward",
    "(Tensor grad_loss, Tensor mask, Tensor gradient_spectrum, Tensor factor, int p, int q, int width,"
    " float visible_weight, ScalarType dtype, str backend) -> Tensor",
)


def _outputs(image: Tensor, average: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Not yet written: the loss, its gradient by the spectrum of each transformed image [B or 1, C, H, R, 2], and what
    that is still to be multiplied with [B or 1]."""
    batch, channels, height, width = image.shape
    images = min(batch, 1) if average else batch
    loss = torch.empty((), dtype=torch.float32, device=image.device)
    return loss, loss.new_empty((images, channels, height, width // 2 + 1, 2)), loss.new_empty((images,))


def _groups(images: int, like: Tensor) -> Iterator[slice]:
    """Images to transform together. On a CPU few enough for the caches, and small enough that the memory allocator
    keeps the temporaries instead of asking the system for zeroed pages each time, which costs more than the FFT."""
    step = max(images, 1)
    if like.device.type == "cpu":
        step = max(1, torch.get_num_threads() * 5 * 2**17 // max(1, 4 * like[0].numel()))
    for start in range(0, images, step):
        yield slice(start, min(start + step, images))


@torch.library.impl("fastmim::frequency_loss", ("cpu", "cuda"))
def _forward(
    prediction: Tensor, image: Tensor, mask: Tensor, p: int, q: int, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *chosen, backend = options
    how = plan(*chosen)
    loss, spectrum, factor = outputs = _outputs(image, how.average)
    if image.numel() == 0:
        return loss.zero_(), spectrum, factor
    station = _station(backend, spectrum)
    mask, images = mask.contiguous(), factor.shape[0]
    scale = 1 / (images * (image[0].numel() if how.mean else 1))
    value = factor.new_empty((images,), dtype=torch.float64)
    for part in _groups(images, image):
        members = slice(None) if how.average else part
        error = spectrum.new_empty((part.stop - part.start, *image.shape[1:]))
        means = image[members].mean(dim=(2, 3), dtype=torch.float32) if how.mean_weight else None
        station.error(prediction[members], image[members], mask[members], (p, q), means, how, error)
        transformed = torch.view_as_real(torch.fft.rfft2(error, norm="ortho")).contiguous()
        station.spectrum(transformed, image.shape[3], how, scale, spectrum[part], factor[part], value[part])
    loss.copy_(value.sum())
    return outputs


@torch.library.impl("fastmim::frequency_loss_backward", ("cpu", "cuda"))
def _backward(
    grad_loss: Tensor,
    mask: Tensor,
    spectrum: Tensor,
    factor: Tensor,
    p: int,
    q: int,
    width: int,
    visible_weight: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    gradient = _gradient(mask, spectrum, width, dtype)
    if gradient.numel() == 0:
        return gradient
    station = _station(backend, gradient)
    mask, grad_loss, images = mask.contiguous(), grad_loss.to(torch.float32), spectrum.shape[0]
    large = gradient.numel() * gradient.element_size() >= 8 * 2**20
    for part in _groups(images, gradient):
        members = slice(None) if images == 1 else part
        picture = torch.fft.irfft2(torch.view_as_complex(spectrum[part]), s=gradient.shape[2:], norm="ortho")
        station.gradient(
            grad_loss,
            picture.contiguous(),
            mask[members],
            (p, q),
            factor[part],
            visible_weight,
            large,
            gradient[members],
        )
    return gradient


def _gradient(mask: Tensor, spectrum: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """[B, C, H, W], not yet written."""
    return spectrum.new_empty((mask.shape[0], *spectrum.shape[1:3], width), dtype=dtype)


def _station(backend: str, result: Tensor) -> Any:
    """Where the kernels are; `result` is the large tensor that they will write."""
    if backend == "triton":
        return _backends.triton()
    compiled().prefer_large_pages(result.data_ptr(), result.nbytes)
    return _Cpu


class _Cpu:
    """csrc/cpu/frequency_loss.cpp, called as fastmim.kernels.frequency_loss is."""

    @staticmethod
    def error(
        prediction: Tensor,
        image: Tensor,
        mask: Tensor,
        cell: tuple[int, int],
        means: Tensor | None,
        how: Plan,
        out: Tensor,
    ) -> None:
        compiled().frequency_error(
            (*image.shape, *cell),
            (prediction.data_ptr(), ELEMENTS[prediction.dtype], prediction.stride()),
            (image.data_ptr(), ELEMENTS[image.dtype], image.stride()),
            mask.data_ptr(),
            0 if means is None else means.data_ptr(),
            how.factor,
            how.mean_weight,
            how.average,
            out.data_ptr(),
        )

    @staticmethod
    def spectrum(
        spectrum: Tensor, width: int, how: Plan, scale: float, gradient: Tensor, factor: Tensor, value: Tensor
    ) -> None:
        images, channels, height = spectrum.shape[:3]
        compiled().frequency_spectrum(
            images,
            channels * height,
            width,
            KINDS.index(how.kind),
            how.exponent,
            how.normalise,
            scale,
            spectrum.data_ptr(),
            gradient.data_ptr(),
            factor.data_ptr(),
            value.data_ptr(),
        )

    @staticmethod
    def gradient(
        grad_loss: Tensor,
        picture: Tensor,
        mask: Tensor,
        cell: tuple[int, int],
        factor: Tensor,
        visible_weight: float,
        large: bool,
        out: Tensor,
    ) -> None:
        one_for_all = picture.shape[0] != out.shape[0]
        compiled().frequency_gradient(
            (*out.shape, *cell),
            mask.data_ptr(),
            picture.data_ptr(),
            one_for_all,
            factor.data_ptr(),
            grad_loss.data_ptr(),
            1 / out.shape[0] if one_for_all else 1.0,
            visible_weight,
            large,
            out.data_ptr(),
            ELEMENTS[out.dtype],
        )


@torch.library.register_fake("fastmim::frequency_loss")
def _fake(prediction: Tensor, image: Tensor, mask: Tensor, p: int, q: int, *options: Any) -> tuple[Tensor, ...]:
    return _outputs(image, plan(*options[:-1]).average)


@torch.library.register_fake("fastmim::frequency_loss_backward")
def _fake_backward(
    grad_loss: Tensor, mask: Tensor, spectrum: Tensor, factor: Tensor, p: int, q: int, width: int,
    visible_weight: float, dtype: torch.dtype, backend: str,
) -> Tensor:  # fmt: skip
    return _gradient(mask, spectrum, width, dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    prediction, _, mask, p, q, *options = inputs
    _, spectrum, factor = output
    ctx.mark_non_differentiable(spectrum, factor)
    ctx.save_for_backward(mask, spectrum, factor)
    ctx.rest = p, q, prediction.shape[3], plan(*options[:-1]).visible_weight, prediction.dtype, options[-1]


def _differentiate(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.fastmim.frequency_loss_backward(grad_loss, *ctx.saved_tensors, *ctx.rest)
    return gradient, *[None] * 14


def _refuse(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("frequency_loss: there is no second derivative, its weights are constants by definition")


torch.library.register_autograd("fastmim::frequency_loss", _differentiate, setup_context=_save)
torch.library.register_autograd("fastmim::frequency_loss_backward", _refuse)


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
    chosen = _backends.choose(prediction.device, torch.promote_types(prediction.dtype, image.dtype), backend)
    if chosen == "reference":
        return frequency_loss_ref(prediction, image, mask, (p, q), **options)
    return torch.ops.fastmim.frequency_loss(prediction, image, mask, p, q, *options.values(), chosen)[0]


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
