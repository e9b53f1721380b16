"""ResNet (arXiv 1512.03385) with timm's names and state-dict keys.

Legend: B batch, C channels, H W image, h w = H/32, W/32 (rounded up).
"""

from typing import Any

from torch import Tensor, nn

from fastmim.layers.drop_path import drop_path, drop_path_rates
from fastmim.models.encoder import Encoder, InsertFunction, Insertion, pair
from fastmim.models.norms import BatchNorm2d
from fastmim.models.registry import register_encoders

__all__ = ["BasicBlock", "Bottleneck", "ResNet"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and 34)."""

    expansion = 1

    def __init__(
        self, in_channels: int, width: int, stride: int, downsample: nn.Module | None, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.drop_path = drop_path(drop_path_rate)

    def zero_init_last(self) -> None:
        """Let the block start as its shortcut."""
        nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.drop_path(self.bn2(self.conv2(x)))
        return self.act2(x + shortcut)


class Bottleneck(nn.Module):
    """1x1 down, 3x3 (which carries the stride), 1x1 up by 4, and a shortcut (ResNet-50 and deeper)."""

    expansion = 4

    def __init__(
        self, in_channels: int, width: int, stride: int, downsample: nn.Module | None, drop_path_rate: float
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = BatchNorm2d(width)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = BatchNorm2d(width * self.expansion)
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.drop_path = drop_path(drop_path_rate)

    def zero_init_last(self) -> None:
        """Let the block start as its shortcut."""
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.drop_path(self.bn3(self.conv3(x)))
        return self.act3(x + shortcut)


class ResNet(Encoder):
    """Stem of stride 4, four stages of residual blocks, average pooling, classifier.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        layers: number of blocks of each of the four stages.
        num_classes: size of the classifier; 0 for none, then `forward` gives the pooled features.
        in_chans: channels of the image.
        img_size: recorded only; images of any size may be given.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; the first has none, between them it grows linearly.
        zero_init_last: start every block as its shortcut (last batch norm's weight zero), as timm does.
    """

    stride = 32

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: tuple[int, int, int, int],
        *,
        num_classes: int = 0,
        in_chans: int = 3,
        img_size: int | tuple[int, int] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.img_size = None if img_size is None else pair(img_size, "img_size")
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm2d(64)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)

        rates = iter(drop_path_rates(drop_path_rate, sum(layers)))
        channels = 64
        insertions = []
        for index, depth in enumerate(layers):
            insertions.append(Insertion(channels, stride=4 if index == 0 else 2 ** (index + 1), layout="map"))
            width, stride = 64 * 2**index, 1 if index == 0 else 2
            stage = nn.Sequential()
            for i in range(depth):
                step = stride if i == 0 else 1
                downsample = _downsample(channels, width * block.expansion, step) if i == 0 else None
                stage.append(block(channels, width, step, downsample, next(rates)))
                channels = width * block.expansion
            self.add_module(f"layer{index + 1}", stage)
        self._insertions = tuple(insertions)
        self.num_features = channels

        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
        self.head_drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(channels, num_classes) if num_classes > 0 else nn.Identity()
        self._init_weights(zero_init_last)

    def _init_weights(self, zero_init_last: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_last and isinstance(module, BasicBlock | Bottleneck):
                module.zero_init_last()

    @staticmethod
    def to_timm(kwargs: dict[str, Any]) -> dict[str, Any]:
        """timm's ResNet knows no image size."""
        return {key: value for key, value in kwargs.items() if key != "img_size"}

    def insertion(self, at: int | None = None) -> Insertion:
        """Where `forward_map` can insert: before `layer{at + 1}`; 3 (before the last stage) when `at` is None."""
        return self._insertions[self._insertion_index(at, count=4, default=3)]

    def forward_map(self, images: Tensor, insert: InsertFunction | None = None, at: int | None = None) -> Tensor:
        """[B, in_chans, H, W] -> [B, num_features, h, w]; `insert` replaces the map before `layer{at + 1}`."""
        self._check_images(images)
        index = self._insertion_index(at, count=4, default=3)
        x = self.maxpool(self.act1(self.bn1(self.conv1(images))))
        for i in range(4):
            if insert is not None and i == index:
                x = insert(x)
            x = self.get_submodule(f"layer{i + 1}")(x)
        return x

    def module_before(self, at: int | None = None) -> str:
        """The name of the submodule whose output `insert` receives at insertion point `at`."""
        index = self._insertion_index(at, count=4, default=3)
        return f"layer{index}" if index else "maxpool"

    def forward_from(self, x: Tensor, at: int | None = None) -> Tensor:
        """The map before `layer{at + 1}` -> [B, num_features, h, w]."""
        for i in range(self._insertion_index(at, count=4, default=3), 4):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return x

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, num_features, h, w]."""
        return self.forward_map(images)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, num_features, h, w] -> logits [B, num_classes]; pooled features without a classifier or `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)


def _downsample(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), BatchNorm2d(out_channels))


register_encoders(
    ResNet,
    {
        "resnet18": {"block": BasicBlock, "layers": (2, 2, 2, 2)},
        "resnet34": {"block": BasicBlock, "layers": (3, 4, 6, 3)},
        "resnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3)},
        "resnet101": {"block": Bottleneck, "layers": (3, 4, 23, 3)},
        "resnet152": {"block": Bottleneck, "layers": (3, 8, 36, 3)},
        "resnet200": {"block": Bottleneck, "layers": (3, 24, 36, 3)},
    },
)
