"""Squeeze and excitation whose squeeze sees visible positions only.

Legend: B batch, K visible cells, t tile side, C channels.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from fastmim.ops import TileIndex

__all__ = ["MaskedSqueezeExcite"]


class MaskedSqueezeExcite(nn.Module):
    """Gates channels by a small MLP of their visible mean; constructor and keys of timm's SqueezeExcite.

    Args:
        channels: C.
        rd_ratio: width of the MLP as a share of C.
        rd_channels: width of the MLP, instead of `rd_ratio`.
        rd_divisor: a width from `rd_ratio` is rounded to a multiple of this.
        bias: whether the two linear layers have biases.
        act_layer: activation between them.
        gate_layer: what turns the MLP's output into factors.

    Source: arXiv 1709.01507; the mean over visible positions as in SparK's issue 54.
    """

    def __init__(
        self,
        channels: int,
        rd_ratio: float = 1.0 / 16,
        rd_channels: int | None = None,
        rd_divisor: int = 8,
        bias: bool = True,
        act_layer: type[nn.Module] = nn.ReLU,
        gate_layer: type[nn.Module] = nn.Sigmoid,
    ) -> None:
        super().__init__()
        if rd_channels is None:
            rd_channels = max(rd_divisor, int(channels * rd_ratio + rd_divisor / 2) // rd_divisor * rd_divisor)
        self.fc1 = nn.Conv2d(channels, rd_channels, kernel_size=1, bias=bias)
        self.act = act_layer()
        self.fc2 = nn.Conv2d(rd_channels, channels, kernel_size=1, bias=bias)
        self.gate = gate_layer()

    def forward(self, x: Tensor, tiles: TileIndex) -> Tensor:
        """[B, K, t, t, C] -> [B, K, t, t, C]."""
        mean = x.mean((1, 2, 3), keepdim=True)  # [B, 1, 1, 1, C]
        hidden = self.act(F.linear(mean, self.fc1.weight.flatten(1), self.fc1.bias))
        return x * self.gate(F.linear(hidden, self.fc2.weight.flatten(1), self.fc2.bias))
