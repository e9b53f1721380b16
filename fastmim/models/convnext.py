"""ConvNeXt (arXiv 2201.03545) and ConvNeXt V2 (arXiv 2301.00808) with timm's names and state-dict keys.

Legend: B batch, C channels, H W image, h w = H/32, W/32 (rounded down).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmim.layers.drop_path import drop_path, drop_path_rates
from fastmim.models.encoder import Encoder, InsertFunction, Insertion, pair
from fastmim.models.norms import GlobalResponseNorm, LayerNorm2d
from fastmim.models.registry import register_encoders

__all__ = ["ConvNeXt", "ConvNeXtBlock"]


class PointwiseConv(nn.Linear):
    """A linear layer over channels-last features whose weight is stored as a 1x1 convolution's, [out, in, 1, 1].

    timm stores the MLP of its small ConvNeXts so. The computation is that of `nn.Linear`.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(self.weight.detach()[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class ConvNeXtMlp(nn.Module):
    """Linear, GELU, (V2: global response norm,) linear, on channels-last maps [B, h, w, C]."""

    def __init__(self, channels: int, hidden: int, *, conv_mlp: bool, use_grn: bool) -> None:
        super().__init__()
        linear = PointwiseConv if conv_mlp else nn.Linear
        self.fc1 = linear(channels, hidden)
        self.act = nn.GELU()
        self.grn = GlobalResponseNorm(hidden) if use_grn else nn.Identity()
        self.fc2 = linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.grn(self.act(self.fc1(x))))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, layer norm, MLP of ratio 4, LayerScale, drop path, shortcut: [B, C, h, w] -> [B, C, h, w]."""

    def __init__(
        self,
        channels: int,
        *,
        ls_init_value: float | None = 1e-6,
        conv_mlp: bool = False,
        use_grn: bool = False,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = ConvNeXtMlp(channels, 4 * channels, conv_mlp=conv_mlp, use_grn=use_grn)
        self.gamma = None if ls_init_value is None else nn.Parameter(torch.full((channels,), ls_init_value))
        self.drop_path = drop_path(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv_dw(x).permute(0, 2, 3, 1)  # [B, h, w, C]
        branch = self.mlp(self.norm(branch))
        if self.gamma is not None:
            branch = branch * self.gamma
        return x + self.drop_path(branch.permute(0, 3, 1, 2))


class ConvNeXtStage(nn.Module):
    """Downsampling by 2 (none in the first stage), then blocks."""

    def __init__(self, in_channels: int, channels: int, blocks: list[ConvNeXtBlock], *, downsample: bool) -> None:
        super().__init__()
        self.downsample = (
            nn.Sequential(LayerNorm2d(in_channels), nn.Conv2d(in_channels, channels, 2, stride=2))
            if downsample
            else nn.Identity()
        )
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor, insert: InsertFunction | None = None) -> Tensor:
        x = self.downsample(x)
        return self.blocks(x if insert is None else insert(x))


class ConvNeXtHead(nn.Module):
    """Average pooling, layer norm, classifier: [B, C, h, w] -> [B, num_classes], or [B, C] without a classifier."""

    def __init__(self, channels: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.norm = LayerNorm2d(channels)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(channels, num_classes) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(self.norm(self.global_pool(x)).flatten(1))
        return x if pre_logits else self.fc(x)


class ConvNeXt(Encoder):
    """Patch stem of stride 4, four stages, pooling, layer norm, classifier.

    Args:
        depths: number of blocks of each of the four stages.
        dims: channels of each stage.
        num_classes: size of the classifier; 0 for none, then `forward` gives the pooled, normalised features.
        in_chans: channels of the image.
        img_size: recorded only; images of any size from 32 x 32 may be given.
        ls_init_value: start of LayerScale; None for none (V2).
        conv_mlp: store the MLP as 1x1 convolutions (timm's choice for nano and smaller).
        use_grn: global response norm inside the MLP (V2).
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block; the first has none, between them it grows linearly.
    """

    stride = 32

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        dims: tuple[int, int, int, int],
        *,
        num_classes: int = 0,
        in_chans: int = 3,
        img_size: int | tuple[int, int] | None = None,
        ls_init_value: float | None = 1e-6,
        conv_mlp: bool = False,
        use_grn: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.img_size = None if img_size is None else pair(img_size, "img_size")
        self.num_classes = num_classes
        self.num_features = dims[-1]
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, stride=4), LayerNorm2d(dims[0]))

        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        self.stages = nn.Sequential()
        for index, (depth, channels) in enumerate(zip(depths, dims, strict=True)):
            blocks = [
                ConvNeXtBlock(
                    channels,
                    ls_init_value=ls_init_value,
                    conv_mlp=conv_mlp,
                    use_grn=use_grn,
                    drop_path_rate=next(rates),
                )
                for _ in range(depth)
            ]
            self.stages.append(ConvNeXtStage(dims[max(index - 1, 0)], channels, blocks, downsample=index > 0))
        self._insertions = tuple(Insertion(c, stride=4 * 2**i, layout="map") for i, c in enumerate(dims))
        self.head = ConvNeXtHead(dims[-1], num_classes, drop_rate)
        self.apply(_init_weights)

    @staticmethod
    def to_timm(kwargs: dict[str, Any]) -> dict[str, Any]:
        """timm's ConvNeXt knows no image size."""
        return {key: value for key, value in kwargs.items() if key != "img_size"}

    def _check_images(self, images: Tensor) -> None:
        super()._check_images(images)
        if min(images.shape[-2:]) < self.stride:
            raise ValueError(
                f"{self._label}: images are at least {self.stride} x {self.stride} pixels, "
                f"but was given {images.shape[-2]} x {images.shape[-1]}"
            )

    def insertion(self, at: int | None = None) -> Insertion:
        """Where `forward_map` can insert: after the downsampling of stage `at`; 3 (the last) when `at` is None."""
        return self._insertions[self._insertion_index(at, count=4, default=3)]

    def forward_map(self, images: Tensor, insert: InsertFunction | None = None, at: int | None = None) -> Tensor:
        """[B, in_chans, H, W] -> [B, num_features, h, w]; `insert` replaces the map between the downsampling of
        stage `at` and its blocks.
        """
        self._check_images(images)
        index = self._insertion_index(at, count=4, default=3)
        x = self.stem(images)
        for i, stage in enumerate(self.stages):
            x = stage(x, insert if i == index else None)
        return x

    def module_before(self, at: int | None = None) -> str:
        """The name of the submodule whose output `insert` receives at insertion point `at`."""
        return f"stages.{self._insertion_index(at, count=4, default=3)}.downsample"

    def forward_from(self, x: Tensor, at: int | None = None) -> Tensor:
        """The map between the downsampling of stage `at` and its blocks -> [B, num_features, h, w]."""
        index = self._insertion_index(at, count=4, default=3)
        x = self.get_submodule(f"stages.{index}.blocks")(x)
        for i in range(index + 1, 4):
            x = self.stages[i](x)
        return x

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, num_features, h, w], before the head's layer norm."""
        return self.forward_map(images)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, num_features, h, w] -> logits [B, num_classes]; pooled features without a classifier or `pre_logits`."""
        return self.head(x, pre_logits)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _variants() -> dict[str, dict[str, Any]]:
    sizes: dict[str, tuple[tuple[int, int, int, int], int]] = {  # depths, channels of the first stage
        "atto": ((2, 2, 6, 2), 40),
        "femto": ((2, 2, 6, 2), 48),
        "pico": ((2, 2, 6, 2), 64),
        "nano": ((2, 2, 8, 2), 80),
        "tiny": ((3, 3, 9, 3), 96),
        "small": ((3, 3, 27, 3), 96),
        "base": ((3, 3, 27, 3), 128),
        "large": ((3, 3, 27, 3), 192),
        "xlarge": ((3, 3, 27, 3), 256),
        "huge": ((3, 3, 27, 3), 352),
    }
    variants: dict[str, dict[str, Any]] = {}
    for size, (depths, width) in sizes.items():
        shape: dict[str, Any] = {"depths": depths, "dims": tuple(width * 2**i for i in range(4))}
        if size in ("atto", "femto", "pico", "nano"):
            shape["conv_mlp"] = True
        if size != "huge":
            variants[f"convnext_{size}"] = shape
        if size != "xlarge":
            variants[f"convnextv2_{size}"] = shape | {"use_grn": True, "ls_init_value": None}
    return variants


register_encoders(ConvNeXt, _variants())
