"""A²MIM (arXiv 2205.13943) the plain way: fill the image, compose the prediction, transform both images."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines.masking import cell_mask, repeat_mask


def l1(error: Tensor) -> Tensor:
    return error.abs()


def focal_l1(error: Tensor) -> Tensor:
    return error.abs() * (2 * torch.sigmoid(0.2 * error.abs()) - 1)


class PlainA2MIM(nn.Module):
    """images [B, C, H, W] -> loss. `freq` holds the settings of the Fourier loss (see fastmim.methods.a2mim)."""

    eps = 1e-5  # the authors'; a test compares without

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        channels: int,
        *,
        at: int,
        grid: tuple[int, int],
        token_grid: tuple[int, int],
        keep: int,
        gated: bool,
        pixel_loss: Callable[[Tensor], Tensor],
        freq: Any,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_token = nn.ParameterDict({"token": nn.Parameter(torch.zeros(channels))})
        if gated:
            self.mask_token["gate"] = nn.Parameter(torch.full((channels,), 1e-6))
        self.head = head
        self.at, self.grid, self.token_grid, self.keep = at, grid, token_grid, keep
        self.pixel_loss, self.freq = pixel_loss, freq

    def insert(self, x: Tensor, mask: Tensor) -> Tensor:
        """mask: [B, 1, h, w] float, 1 = removed."""
        token, gate = self.mask_token["token"], self.mask_token.get("gate", None)
        if x.dim() == 3:
            mask = mask.flatten(2).transpose(1, 2)
        else:
            token, gate = token.view(1, -1, 1, 1), None if gate is None else gate.view(1, -1, 1, 1)
        if gate is not None:
            x = x * (1 - mask) + x * mask * gate
        return x + mask * token

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        cells = self.grid[0] * self.grid[1]
        mask = cell_mask(images.shape[0], cells, self.keep, images.device, noise)
        tokens, pixels = (repeat_mask(mask, self.grid, size) for size in (self.token_grid, tuple(images.shape[2:])))
        mean = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
        filled = images * (1 - pixels) + mean * pixels
        prediction = self.head(self.encoder.forward_map(filled, lambda x: self.insert(x, tokens), self.at)).to(
            images.dtype
        )
        spatial = (self.pixel_loss(prediction - images) * pixels).sum() / (pixels.sum() + self.eps) / images.shape[1]
        if self.freq.weight == 0:
            return spatial
        return spatial + self.freq.weight * self.frequency_loss(prediction, images, pixels)

    def frequency_loss(self, prediction: Tensor, images: Tensor, pixels: Tensor) -> Tensor:
        freq = self.freq
        replacement = freq.replacement or {"paper": "prediction", "code": "mixed"}[freq.form]
        other = {
            "target": lambda: images,
            "prediction": lambda: prediction.detach(),
            "mixed": lambda: 0.5 * prediction.detach() + 0.5 * images,
            "mean": lambda: images.mean(dim=(2, 3), keepdim=True).expand_as(images),
        }[replacement]()
        weight = pixels + (1 - pixels) * freq.visible_weight
        composed = prediction * weight + other * (1 - weight)
        with torch.autocast(images.device.type, enabled=False):
            predicted, true = (torch.fft.fft2(x, norm="ortho") for x in (composed, images))
            return self.paper_form(predicted - true) if freq.form == "paper" else self.code_form(predicted, true)

    def paper_form(self, difference: Tensor) -> Tensor:
        """Each image by itself; frequencies weighted by their own error."""
        freq = self.freq
        modulus = difference.abs()
        weight = modulus.detach() ** (freq.alpha if freq.focal else 0.0)
        if freq.normalise == "image_max":
            weight = torch.nan_to_num(weight / weight.amax(dim=(1, 2, 3), keepdim=True))
        error = difference.real**2 + difference.imag**2 if freq.distance == "squared" else modulus
        loss = weight * error
        return loss.mean() if freq.reduce == "mean" else loss.sum(dim=(1, 2, 3)).mean()

    def code_form(self, predicted: Tensor, true: Tensor) -> Tensor:
        """What the released recipes run: with focal weights, spectra averaged over the batch."""
        freq = self.freq
        if not freq.focal:
            return self.reduce(self.pixel_loss((predicted - true).abs()))
        difference = predicted.mean(dim=0, keepdim=True) - true.mean(dim=0, keepdim=True)
        squared = difference.real**2 + difference.imag**2
        weight = torch.log(squared.detach() ** (freq.alpha / 2) + 1.0)
        weight = torch.nan_to_num(weight / weight.max()).clamp(0.0, 1.0)
        return self.reduce(weight * squared)

    def reduce(self, loss: Tensor) -> Tensor:
        return loss.mean() if self.freq.reduce == "mean" else loss.sum(dim=(1, 2, 3)).mean()
