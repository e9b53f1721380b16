"""FCMAE (arXiv 2301.00808) the plain way: the encoder dense and masked, as its authors trained their models."""

import torch
from torch import Tensor, nn

from benchmarks.baselines.convnext import Block
from benchmarks.baselines.masked_cnn import Visible, masked_stages
from benchmarks.baselines.masking import cell_mask


class Decoder(nn.Module):
    def __init__(self, inputs: int, values: int, dim: int, depth: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inputs, dim, 1)
        self.mask_token = nn.Parameter(torch.zeros(1, dim, 1, 1))
        self.blocks = nn.Sequential(*(Block(dim, grn=True, layer_scale=False) for _ in range(depth)))
        self.pred = nn.Conv2d(dim, values, 1)

    def forward(self, x: Tensor, removed: Tensor) -> Tensor:
        """removed: [B, 1, h, w] float."""
        x = self.proj(x)
        removed = removed.to(x.dtype)
        x = x * (1 - removed) + self.mask_token * removed
        return self.pred(self.blocks(x)).flatten(2).transpose(1, 2)


def cell_loss(prediction: Tensor, images: Tensor, removed: Tensor, side: int, norm_pix: bool) -> Tensor:
    """Mean squared error of removed cells. prediction: [B, cells, side * side * C] or [B, C, H, W]."""
    target = patchify(images, side)
    if norm_pix:
        mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6) ** 0.5
    prediction = prediction if prediction.dim() == 3 else patchify(prediction, side)
    loss = ((prediction.float() - target) ** 2).mean(dim=-1)
    return (loss * removed).sum() / removed.sum()


def patchify(images: Tensor, side: int) -> Tensor:
    batch, channels, height, width = images.shape
    x = images.reshape(batch, channels, height // side, side, width // side, side)
    return torch.einsum("bchpwq->bhwpqc", x).reshape(batch, -1, side * side * channels)


class PlainFCMAE(nn.Module):
    """images [B, C, H, W] -> loss."""

    def __init__(
        self, encoder: nn.Module, decoder: Decoder, grid: tuple[int, int], side: int, keep: int, norm_pix: bool
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.grid, self.side, self.keep, self.norm_pix = grid, side, keep, norm_pix

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        removed = cell_mask(images.shape[0], self.grid[0] * self.grid[1], self.keep, images.device, noise)
        last = masked_stages(self.encoder, images, Visible(removed, self.grid))[-1]
        prediction = self.decoder(last, removed.view(-1, 1, *self.grid))
        return cell_loss(prediction, images, removed, self.side, self.norm_pix)
