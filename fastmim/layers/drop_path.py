"""Stochastic depth (arXiv 1603.09382): a residual branch is dropped for whole images."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Zero the branch with probability `drop_prob` for each image, and scale what is kept by 1 / (1 - drop_prob)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"drop_path_rate is in [0, 1), but was given {drop_prob}")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return x * self.draw(x) if self.active else x

    @property
    def active(self) -> bool:
        return self.training and self.drop_prob > 0.0

    def draw(self, x: Tensor) -> Tensor:
        """What the branch of each image is multiplied by: 0 or 1 / (1 - drop_prob), of shape [B, 1, ...]."""
        keep = 1.0 - self.drop_prob
        return x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """One rate a block, rising linearly from 0 to `rate`."""
    return torch.linspace(0.0, rate, depth, device="cpu").tolist()


def drop_path(rate: float) -> nn.Module:
    """A `DropPath`, or nothing where the rate is 0."""
    return DropPath(rate) if rate > 0.0 else nn.Identity()
