"""A plain ConvNeXt (V1 and V2), dense; the MLPs on channels-last views, as its authors write it."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class GRN(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:  # [B, h, w, C]
        energy = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        share = energy / (energy.mean(dim=-1, keepdim=True) + 1e-6)
        return self.weight * (x * share) + self.bias + x


class Mlp(nn.Module):
    def __init__(self, dim: int, grn: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.grn = GRN(4 * dim) if grn else nn.Identity()
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.grn(F.gelu(self.fc1(x))))


class Block(nn.Module):
    def __init__(self, dim: int, grn: bool, layer_scale: bool) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, grn)
        self.gamma = nn.Parameter(torch.ones(dim)) if layer_scale else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv_dw(x).permute(0, 2, 3, 1)  # [B, h, w, C]
        out = self.mlp(self.norm(out))
        if self.gamma is not None:
            out = self.gamma * out
        return x + out.permute(0, 3, 1, 2)


class Stage(nn.Module):
    def __init__(self, inputs: int, dim: int, depth: int, first: bool, grn: bool, layer_scale: bool) -> None:
        super().__init__()
        self.downsample = (
            nn.Identity() if first else nn.Sequential(LayerNorm2d(inputs, eps=1e-6), nn.Conv2d(inputs, dim, 2, 2))
        )
        self.blocks = nn.Sequential(*(Block(dim, grn, layer_scale) for _ in range(depth)))


class PlainConvNeXt(nn.Module):
    def __init__(
        self, depths: Sequence[int], dims: Sequence[int], in_chans: int = 3, grn: bool = False, layer_scale: bool = True
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, 4), LayerNorm2d(dims[0], eps=1e-6))
        inputs = [dims[0], *dims[:-1]]
        self.stages = nn.ModuleList(
            Stage(inputs[i], dims[i], depths[i], i == 0, grn, layer_scale) for i in range(len(depths))
        )

    def forward_map(self, images: Tensor, insert: Callable[[Tensor], Tensor], at: int = 3) -> Tensor:
        """[B, C, h, w]; `insert` acts on the map after the downsampling of stage `at`."""
        x = self.stem(images)
        for i, stage in enumerate(self.stages):
            x = stage.downsample(x)
            if i == at:
                x = insert(x)
            x = stage.blocks(x)
        return x
