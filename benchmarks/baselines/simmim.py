"""SimMIM (arXiv 2111.09886) the plain way: a token multiplied in by a float mask, the loss over the whole image."""

import torch
from torch import Tensor, nn

from benchmarks.baselines.masking import cell_mask, repeat_mask


def pixel_head(channels: int, stride: int, in_chans: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, stride * stride * in_chans, 1), nn.PixelShuffle(stride))


class PlainSimMIM(nn.Module):
    """images [B, C, H, W] -> loss."""

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
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.mask_token = nn.ParameterDict({"token": nn.Parameter(torch.zeros(channels))})
        self.head = head
        self.at, self.grid, self.token_grid, self.keep = at, grid, token_grid, keep

    def insert(self, x: Tensor, mask: Tensor) -> Tensor:
        """mask: [B, 1, h, w] float, 1 = removed."""
        token = self.mask_token["token"]
        if x.dim() == 3:
            w, token = mask.flatten(2).transpose(1, 2), token.expand(x.shape[0], x.shape[1], -1)
        else:
            w, token = mask, token.view(1, -1, 1, 1).expand_as(x)
        w = w.type_as(token)
        return x * (1 - w) + token * w

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        cells = self.grid[0] * self.grid[1]
        mask = cell_mask(images.shape[0], cells, self.keep, images.device, noise)
        tokens = repeat_mask(mask, self.grid, self.token_grid)
        prediction = self.head(self.encoder.forward_map(images, lambda x: self.insert(x, tokens), self.at))
        pixels = repeat_mask(mask, self.grid, tuple(images.shape[2:]))
        loss = nn.functional.l1_loss(prediction.to(images.dtype), images, reduction="none")
        return (loss * pixels).sum() / (pixels.sum() + self.eps) / images.shape[1]
