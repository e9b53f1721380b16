"""SparK (arXiv 2301.03580) the plain way: dense convolutions times a mask, then the U-Net over densified maps."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.convnext import LayerNorm2d
from benchmarks.baselines.fcmae import Decoder, cell_loss
from benchmarks.baselines.masked_cnn import Visible, batch_norm, masked_stages
from benchmarks.baselines.masking import cell_mask


def stage_norm(norm: nn.Module, x: Tensor, visible: Visible) -> Tensor:
    return batch_norm(norm, x, visible) if isinstance(norm, nn.BatchNorm2d) else norm(x)


class Densify(nn.Module):
    def __init__(self, channels: int, width: int, kernel: int, batch: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if batch else LayerNorm2d(channels, eps=1e-6)
        self.mask_embedding = nn.Parameter(torch.zeros(channels))
        same = kernel == 1 and channels == width
        self.proj = nn.Identity() if same else nn.Conv2d(channels, width, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, visible: Visible) -> Tensor:
        normal = stage_norm(self.norm, x, visible)
        embedding = self.mask_embedding.view(1, -1, 1, 1).to(normal.dtype)
        return self.proj(torch.where(visible.mask(x).bool(), normal, embedding))


class UpBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu6(self.bn1(self.conv1(self.up(x))), inplace=True)))


class UNet(nn.Module):
    def __init__(self, channels: Sequence[int], width: int, doublings: int, out_chans: int, batch: bool) -> None:
        super().__init__()
        self.densify = nn.ModuleList(
            Densify(count, width // 2**level, 1 if level == 0 else 3, batch)
            for level, count in enumerate(reversed(channels))
        )
        self.blocks = nn.ModuleList(UpBlock(width // 2**level) for level in range(doublings))
        self.proj = nn.Conv2d(width // 2**doublings, out_chans, 1)

    def forward(self, stages: list[Tensor], visible: Visible) -> Tensor:
        maps = [densify(stage, visible) for densify, stage in zip(self.densify, reversed(stages), strict=True)]
        x: Tensor | int = 0
        for level, block in enumerate(self.blocks):
            x = block(x + maps[level] if level < len(maps) else x)
        return self.proj(x)


class Light(nn.Module):
    def __init__(self, channels: int, values: int, dim: int, batch: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if batch else LayerNorm2d(channels, eps=1e-6)
        self.decoder = Decoder(channels, values, dim, depth=1)

    def forward(self, stages: list[Tensor], visible: Visible) -> Tensor:
        last = stages[-1]
        return self.decoder(stage_norm(self.norm, last, visible), 1 - visible.mask(last))


class PlainSparK(nn.Module):
    """images [B, C, H, W] -> loss."""

    def __init__(self, encoder: nn.Module, decoder: UNet | Light, grid: tuple[int, int], side: int, keep: int) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.grid, self.side, self.keep = grid, side, keep

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        removed = cell_mask(images.shape[0], self.grid[0] * self.grid[1], self.keep, images.device, noise)
        visible = Visible(removed, self.grid)
        prediction = self.decoder(masked_stages(self.encoder, images, visible), visible)
        return cell_loss(prediction, images, removed, self.side, norm_pix=True)
