"""The lightest decoder: one linear layer from the last feature map to pixels (SimMIM, A²MIM)."""

from torch import Tensor, nn


class PixelHead(nn.Sequential):
    """1x1 convolution to out_chans·s² channels, then PixelShuffle(s): [B, C, h, w] -> [B, out_chans, h·s, w·s].

    No norm, no activation. Weight truncated normal σ 0.02, bias 0.

    Args:
        in_chans: C, channels of the last feature map.
        stride: s, pixels per cell of that map.
        out_chans: channels of the image.
    """

    def __init__(self, in_chans: int, stride: int, out_chans: int = 3) -> None:
        projection = nn.Conv2d(in_chans, out_chans * stride * stride, kernel_size=1)
        nn.init.trunc_normal_(projection.weight, std=0.02)
        assert projection.bias is not None
        nn.init.zeros_(projection.bias)
        super().__init__(projection, nn.PixelShuffle(stride))

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features)
