"""What stands for a tensor while `sparsify` follows the forward of a dense module.

The followed code believes that it handles [B, C, H, W]; the graph that it leaves behind handles tiles.

Legend: B batch, K visible cells, t tile side, C channels, H W map.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

__all__ = ["Kind", "Map", "Plain", "Refused", "TracedValue", "Unknown", "values_in"]


class Refused(Exception):
    """An operation that has no meaning on tiles; the text says why."""


@dataclass(frozen=True)
class Map:
    """A feature map for the followed code, tiles [B, K, t, t, C] in the graph (channels last, whatever the code says).

    `pooled`: one position an image, [B, C, 1, 1] for the code and [B, 1, 1, 1, C] in the graph.
    """

    channels: int | None
    stride: int = 1  # pixels of the input per position
    channels_first: bool = True
    pooled: bool = False

    @property
    def spatial(self) -> frozenset[int]:
        """The dimensions that are positions, as the followed code counts them."""
        return frozenset((2, 3) if self.channels_first else (1, 2))

    @property
    def channel(self) -> int:
        return 1 if self.channels_first else 3

    def but(self, **changes: Any) -> "Map":
        return replace(self, **changes)


@dataclass(frozen=True)
class Plain:
    """The same tensor (or number) for the code and in the graph: a parameter, pooled features, logits."""

    example: torch.Tensor | None = None  # on the meta device, where the shape is known while tracing


@dataclass(frozen=True)
class Unknown:
    """What came of an operation that was refused."""


Kind = Map | Plain | Unknown


class TracedValue(fx.Proxy):
    """A node of the graph, and what it stands for. One node may stand for a map in both of its layouts."""

    kind: Kind = Plain()

    @property
    def shape(self) -> Any:
        if isinstance(self.kind, Map):
            tracer: Any = self.tracer
            return tracer.shape_of(self)
        if isinstance(self.kind, Plain) and self.kind.example is not None:
            return tuple(self.kind.example.shape)
        return fx.proxy.Attribute(self, "shape")

    @property
    def ndim(self) -> Any:
        if isinstance(self.kind, Map):
            return 4
        if isinstance(self.kind, Plain) and self.kind.example is not None:
            return self.kind.example.ndim
        return fx.proxy.Attribute(self, "ndim")

    def dim(self) -> Any:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        if isinstance(self.kind, Map) or (isinstance(self.kind, Plain) and self.kind.example is not None):
            return self.shape if dim is None else self.shape[dim]
        return self.tracer.create_proxy("call_method", "size", (self,) if dim is None else (self, dim), {})


def values_in(*arguments: Any) -> list[TracedValue]:
    """Every traced value in nested arguments, in order."""
    found: list[TracedValue] = []

    def visit(argument: Any) -> Any:
        if isinstance(argument, TracedValue):
            found.append(argument)
        return argument

    fx.node.map_aggregate(arguments, visit)
    return found
