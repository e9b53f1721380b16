"""SparK's hierarchical decoder: every stage's visible tiles are filled up with mask embeddings and enter a U-Net.

Legend: B batch, K visible cells, t tile side, C channels of a stage, D decoder width at that level, h w map, H W image.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmim.layers import MaskedBatchNorm2d, MaskedLayerNorm2d
from fastmim.models.norms import BatchNorm2d
from fastmim.ops import TileIndex, scatter_tiles


class Densify(nn.Module):
    """Tiles of one stage to a dense map of the decoder's width: norm, mask embedding at removed cells, projection.

    Args:
        channels: C.
        width: D.
        norm: normalisation over visible positions.
        kernel: of the projection: 1 at the deepest level (none at all where the widths are equal), 3 elsewhere.
    """

    def __init__(self, channels: int, width: int, norm: MaskedBatchNorm2d | MaskedLayerNorm2d, kernel: int) -> None:
        super().__init__()
        self.norm = norm
        self.mask_embedding = nn.Parameter(torch.empty(channels))
        nn.init.trunc_normal_(self.mask_embedding, std=0.02, a=-0.02, b=0.02)
        self.proj = (
            nn.Identity()
            if kernel == 1 and channels == width
            else nn.Conv2d(channels, width, kernel, padding=kernel // 2)
        )

    def fill(self, x: Tensor, tiles: TileIndex) -> Tensor:
        """[B, K, t, t, C] -> [B, C, h, w]: normalised visible cells, the mask embedding everywhere else."""
        return scatter_tiles(self.norm(x, tiles), tiles, fill=self.mask_embedding)

    def forward(self, x: Tensor, tiles: TileIndex) -> Tensor:
        """[B, K, t, t, C] -> [B, D, h, w]."""
        return self.proj(self.fill(x, tiles))


class UpBlock(nn.Module):
    """Twice the height and width, half the channels: [B, D, h, w] -> [B, D / 2, 2 h, 2 w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.act1 = nn.ReLU6(inplace=True)
        self.conv2 = nn.Conv2d(width, width // 2, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(width // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(self.up(x))))
        return self.bn2(self.conv2(x))


class SparKDecoder(nn.Module):
    """Densified stages, deepest first, each added to what the level below has made, and five doublings up to pixels.

    Args:
        channels: C of each stage, finest first.
        strides: pixels per position of each stage, finest first; each half the next.
        width: D at the deepest level, halved at every doubling (768 in the paper).
        out_chans: channels of the image.
        batch_norm: normalise the stages by batch norm over visible positions (ResNet) instead of layer norm (ConvNeXt).

    Source: arXiv 2301.03580, section 3.3, and the authors' code. 23 M parameters and 12 GMAC at 224 pixels, three times
    a ResNet-50.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        *,
        width: int = 768,
        out_chans: int = 3,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        doublings = int(math.log2(strides[-1]))
        if width < 1 or width % 2**doublings:
            raise ValueError(f"SparKDecoder: width {width} must be divisible by {2**doublings}: each level halves it")
        self.densify = nn.ModuleList()
        for level, count in enumerate(reversed(channels)):
            norm = MaskedBatchNorm2d(count) if batch_norm else MaskedLayerNorm2d(count)
            self.densify.append(Densify(count, width // 2**level, norm, kernel=1 if level == 0 else 3))
        self.blocks = nn.ModuleList(UpBlock(width // 2**level) for level in range(doublings))
        self.proj = nn.Conv2d(width // 2**doublings, out_chans, 1)
        for module in (*self.blocks, self.proj):
            module.apply(_init_weights)

    def forward(self, stages: Sequence[Tensor], tiles: TileIndex) -> Tensor:
        """Stages, finest first, each [B, K, t, t, C] -> [B, out_chans, H, W]."""
        deepest_first = list(reversed(stages))
        x = self.densify[0](deepest_first[0], tiles)
        for level, block in enumerate(self.blocks):
            if 0 < level < len(deepest_first):
                x = x + self.densify[level](deepest_first[level], tiles)
            x = block(x)
        return self.proj(x)


def _init_weights(module: nn.Module) -> None:
    """The official initialisation, of everything but the projections of densified maps."""
    if isinstance(module, nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
