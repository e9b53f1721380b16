"""CNN encoders computed the way of SparK: every position, then the mask. Dense convolutions on channels-last maps.

Legend: B batch, C channels, h w map, M visible positions. A mask is [B, 1, h, w] float, 1 = visible.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.convnext import Block, PlainConvNeXt
from benchmarks.baselines.masking import repeat_mask
from benchmarks.baselines.resnet import BasicBlock, Bottleneck, PlainResNet


class Visible:
    """The visible cells of a batch at every resolution; made once a step."""

    def __init__(self, removed: Tensor, grid: tuple[int, int]) -> None:
        """removed: [B, cells] float, 1 = removed."""
        self.cells, self.grid = 1 - removed, grid
        self._masks: dict[tuple[int, int], Tensor] = {}
        self._rows: dict[tuple[int, int], Tensor] = {}

    def mask(self, x: Tensor) -> Tensor:
        size = (x.shape[2], x.shape[3])
        if size not in self._masks:
            self._masks[size] = repeat_mask(self.cells, self.grid, size)
        return self._masks[size].to(x.dtype)

    def rows(self, x: Tensor) -> Tensor:
        """[M] numbers of the visible positions among all B * h * w."""
        size = (x.shape[2], x.shape[3])
        if size not in self._rows:
            self._rows[size] = self.mask(x).flatten().nonzero().flatten()
        return self._rows[size]


def batch_norm(norm: nn.BatchNorm2d, x: Tensor, visible: Visible) -> Tensor:
    """Visible positions are gathered, normalised and put back among zeros."""
    everywhere = x.permute(0, 2, 3, 1)
    rows = visible.rows(x)
    normal = norm_rows(norm, everywhere.reshape(-1, x.shape[1]).index_select(0, rows))
    out = normal.new_zeros(everywhere.shape).view(-1, x.shape[1]).index_copy(0, rows, normal)
    return out.view(everywhere.shape).permute(0, 3, 1, 2)


def norm_rows(norm: nn.BatchNorm2d, rows: Tensor) -> Tensor:
    if norm.training:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
    return F.batch_norm(
        rows, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum or 0.1, norm.eps
    )


def resnet_block(block: BasicBlock | Bottleneck, x: Tensor, visible: Visible) -> Tensor:
    shortcut = x
    if block.downsample is not None:
        convolution, norm = block.downsample.children()
        shortcut = batch_norm(norm, convolution(x), visible)  # type: ignore[arg-type]
    out = F.relu(batch_norm(block.bn1, block.conv1(x), visible), inplace=True)
    out = batch_norm(block.bn2, block.conv2(out), visible)
    if isinstance(block, Bottleneck):
        out = batch_norm(block.bn3, block.conv3(F.relu(out, inplace=True)), visible)
    return F.relu(out + shortcut, inplace=True)


def resnet_stages(encoder: PlainResNet, images: Tensor, visible: Visible) -> list[Tensor]:
    x = F.relu(batch_norm(encoder.bn1, encoder.conv1(images), visible), inplace=True)
    x = F.max_pool2d(x, 3, 2, 1)
    x = x * visible.mask(x)
    stages = []
    for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        for block in stage:
            x = resnet_block(block, x, visible)
        stages.append(x)
    return stages


def convnext_block(block: Block, x: Tensor, visible: Visible) -> Tensor:
    mask = visible.mask(x)
    rows = mask.permute(0, 2, 3, 1)
    out = (block.conv_dw(x) * mask).permute(0, 2, 3, 1)
    out = F.gelu(block.mlp.fc1(block.norm(out)))
    if hasattr(block.mlp.grn, "weight"):
        out = block.mlp.grn(out * rows)  # the response is that of visible positions
    out = block.mlp.fc2(out)
    if block.gamma is not None:
        out = block.gamma * out
    return x + (out * rows).permute(0, 3, 1, 2)


def convnext_stages(encoder: PlainConvNeXt, images: Tensor, visible: Visible) -> list[Tensor]:
    x = encoder.stem(images)
    x = x * visible.mask(x)
    stages = []
    for stage in encoder.stages:
        if not isinstance(stage.downsample, nn.Identity):
            x = stage.downsample(x)
            x = x * visible.mask(x)
        for block in stage.blocks:
            x = convnext_block(block, x, visible)
        stages.append(x)
    return stages


def masked_stages(encoder: nn.Module, images: Tensor, visible: Visible) -> list[Tensor]:
    """The maps of the four stages, finest first, zero at removed cells."""
    images = (images * visible.mask(images)).contiguous(memory_format=torch.channels_last)
    if isinstance(encoder, PlainResNet):
        return resnet_stages(encoder, images, visible)
    assert isinstance(encoder, PlainConvNeXt)
    return convnext_stages(encoder, images, visible)
