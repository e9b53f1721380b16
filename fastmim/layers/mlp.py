"""The small parts of a transformer block, with timm's arguments and keys."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmim.layers.linear import Linear

__all__ = ["LayerScale", "Mlp"]


class LayerScale(nn.Module):
    """A learned gain for each channel of a residual branch (arXiv 2103.17239)."""

    def __init__(self, dim: int, init_values: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    """Linear, activation, dropout, norm (nothing by default), linear, dropout.

    Args:
        in_features, hidden_features, out_features: widths; the latter two are `in_features` when None.
        act_layer: builds the activation.
        norm_layer: builds a norm of the hidden features; None has none.
        bias: of both linear layers.
        drop: rate of both dropouts.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] | None = None,
        bias: bool = True,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = hidden_features or in_features
        self.fc1 = Linear(in_features, hidden, bias=bias)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(hidden)
        self.fc2 = Linear(hidden, out_features or in_features, bias=bias)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))
