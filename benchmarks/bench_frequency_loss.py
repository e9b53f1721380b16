"""frequency_loss against the same loss by its definition: compose, transform both images in full, compare."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.runner import Case, Settings, Side, backends_here
from fastmim.ops import frequency_loss


def plain(prediction: Tensor, image: Tensor, mask: Tensor, cell: int, form: str) -> Tensor:
    """The usual way, with the released configurations' 'mixed' replacement."""
    batch, _, height, width = image.shape
    pixels = mask.reshape(batch, 1, height // cell, width // cell).to(image.dtype)
    pixels = pixels.repeat_interleave(cell, 2).repeat_interleave(cell, 3)
    prediction = prediction.float()
    composed = prediction * pixels + (0.5 * prediction.detach() + 0.5 * image) * (1 - pixels)
    shown, true = torch.fft.fft2(composed, norm="ortho"), torch.fft.fft2(image, norm="ortho")
    difference = shown.mean(0) - true.mean(0) if form == "code" else shown - true
    squares = difference.real**2 + difference.imag**2
    modulus = squares.detach().sqrt()
    if form == "code":
        weight = torch.log(1 + modulus)
        weight = torch.nan_to_num(weight / weight.max(), nan=0.0).clamp(0, 1)
    else:
        weight = modulus / modulus.amax(dim=(1, 2, 3), keepdim=True)
    return (weight * squares).mean()


def cases(settings: Settings) -> Iterator[Case]:
    batch, side, cell = (2, 64, 32) if settings.quick else (64, 224, 32)
    cells = (side // cell) ** 2
    for dtype in settings.dtypes:

        def inputs(dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
            shape = (batch, 3, side, side)
            prediction = torch.randn(shape, dtype=dtype, device=settings.device, requires_grad=True)
            image = torch.randn(shape, device=settings.device)
            mask = torch.rand(batch, cells, device=settings.device).argsort(dim=1) < -(-cells * 6 // 10)
            return prediction, image, mask

        values = batch * 3 * side**2
        read, written = values * (4 + dtype.itemsize), values * dtype.itemsize
        for form in ("paper", "code"):
            kept = 4 * values if form == "paper" else 0  # half a spectrum in fp32 pairs, written once and read once
            options = {"patch_size": cell, "form": form, "replacement": "mixed"}
            for backend in backends_here("frequency_loss", settings, dtype):
                yield Case(
                    op="frequency_loss",
                    case=f"{form} B{batch} {side}px",
                    candidate=Side(backend, partial(frequency_loss, backend=backend, **options)),
                    baseline=Side("torch eager", partial(plain, cell=cell, form=form)),
                    inputs=inputs,
                    dtype=dtype,
                    images=batch,
                    moved={
                        "forward": read + kept,
                        "backward": kept + written,
                        "both": read + 2 * kept + written,
                    },
                )
