"""masked_patch_loss against the loss of MAE and of SimMIM in plain PyTorch."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.runner import Case, Settings, Side, backends_here
from fastmim.ops import masked_patch_loss


def plain_mae(prediction: Tensor, image: Tensor, mask: Tensor, patch: int) -> Tensor:
    """The usual way: patchify the images, normalise every patch, square every error, then mask."""
    batch, channels, height, width = image.shape
    cells = image.reshape(batch, channels, height // patch, patch, width // patch, patch)
    target = torch.einsum("nchpwq->nhwpqc", cells).reshape(batch, mask.shape[1], -1)
    mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
    target = (target - mean) / (variance + 1.0e-6) ** 0.5
    loss = (prediction.float() - target).square().mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def plain_simmim(prediction: Tensor, image: Tensor, mask: Tensor, patch: int) -> Tensor:
    """The usual way: the mask at full resolution times the error of every pixel."""
    batch, channels, height, width = image.shape
    pixels = mask.reshape(batch, 1, height // patch, width // patch).to(image.dtype)
    pixels = pixels.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    loss = (prediction.float() - image).abs()
    return (loss * pixels).sum() / (pixels.sum() + 1e-5) / channels


def cases(settings: Settings) -> Iterator[Case]:
    batch, side = (2, 64) if settings.quick else (64, 224)
    for dtype in settings.dtypes:
        for name, patch, share, as_image in (("MAE", 16, 0.75, False), ("SimMIM", 32, 0.6, True)):
            cells = (side // patch) ** 2
            removed = round(cells * share)

            def inputs(
                dtype: torch.dtype = dtype, patch: int = patch, cells: int = cells, removed: int = removed,
                as_image: bool = as_image,
            ) -> tuple[Tensor, ...]:  # fmt: skip
                shape = (batch, 3, side, side) if as_image else (batch, cells, 3 * patch**2)
                prediction = torch.randn(shape, dtype=dtype, device=settings.device, requires_grad=True)
                image = torch.randn(batch, 3, side, side, device=settings.device)
                mask = torch.rand(batch, cells, device=settings.device).argsort(dim=1) < removed
                return prediction, image, mask

            read = batch * removed * 3 * patch**2 * (4 + dtype.itemsize)
            written = batch * 3 * side**2 * dtype.itemsize
            options = {"loss": "l1"} if as_image else {"norm_pix": True}
            plain = plain_simmim if as_image else plain_mae
            for backend in backends_here("masked_patch_loss", settings, dtype):
                yield Case(
                    op="masked_patch_loss",
                    case=f"{name} B{batch} {side}px p{patch}",
                    candidate=Side(backend, partial(masked_patch_loss, patch_size=patch, backend=backend, **options)),
                    baseline=Side("torch eager", partial(plain, patch=patch)),
                    inputs=inputs,
                    dtype=dtype,
                    images=batch,
                    moved={"forward": read, "backward": read + written, "both": 2 * read + written},
                )
