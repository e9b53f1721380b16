"""Follows the forward of a dense module and writes down, as a torch.fx graph, the same forward on tiles.

Legend: B batch, K visible cells, t tile side, C channels, H W map.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import fx, nn

from fastmim.layers.fuse_norms import fuse_norms
from fastmim.layers.tile_functions import POINTWISE, RULES, pointwise
from fastmim.layers.tile_layers import LayerFunction, TileLayer, tile_layer
from fastmim.layers.traced import Kind, Map, Plain, Refused, TracedValue, Unknown, values_in

__all__ = ["TileTracer"]

_FOLLOWED = (nn.Sequential, nn.Flatten)  # of torch's own layers; all others are known or refused


class TileTracer(fx.Tracer):
    """One tracing of one module.

    Args:
        outputs: names of submodules whose results are wanted; None for what the forward returns.
        size: (H, W), a stand-in for the size of the images, which the code may compare with but not compute with.
        grn_stats: see `MaskedGRN`.
        layers: how other types of layers run on tiles.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        outputs: tuple[str, ...] | None,
        size: tuple[int, int],
        grn_stats: str,
        layers: Mapping[type, LayerFunction],
    ) -> None:
        super().__init__()
        self._outputs = outputs
        self._size = size
        self._grn_stats = grn_stats
        self._layers = layers
        self._place = ""  # where the followed code is; stays there when it raises
        self._problems: dict[fx.Node, str] = {}
        self._reached: dict[str, Any] = {}
        self.kinds: list[Kind] = []

    def follow(self, module: nn.Module) -> tuple[fx.Graph, list[str]]:
        """The graph (x, tiles) -> outputs, and all in it that cannot run on tiles.

        Afterwards `kinds` tells what the named outputs are.
        """
        self._place = type(module).__name__
        self._tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        try:
            graph = self.trace(module)
        except Exception as error:  # whatever the followed code raises is reported, after what was found before
            found = list(self._problems.values())
            return fx.Graph(), [*found, f"{self._place}: its forward cannot be followed any further: {error}"]
        for node in reversed(graph.nodes):
            if not node.users and node.op not in ("placeholder", "output") and not _in_place(node, module):
                graph.erase_node(node)
        live = set(graph.nodes)
        fuse_norms(graph, module)
        return graph, [problem for node, problem in self._problems.items() if node in live]

    # What torch.fx calls while it traces

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """The forward gets a map; what it returns is brought to tiles."""
        convolutions = (layer for layer in self.root.modules() if isinstance(layer, nn.Conv2d))
        first = next(convolutions, None)
        images = self.emit("placeholder", "x", (), {}, Map(first.in_channels if first else None))
        self.tiles = self.emit("placeholder", "tiles", (), {}, Plain())

        def forward(root: nn.Module, x: TracedValue) -> Any:
            with suppress(_AllReached):
                result = root_fn(root, x)
            if self._outputs is None:
                return fx.node.map_aggregate(result, self._as_output)
            if missing := [name for name in self._outputs if name not in self._reached]:
                raise Refused(f"the output of {', '.join(missing)} is wanted, but its forward never gets there")
            wanted = [self._reached[name] for name in self._outputs]
            self.kinds = [value.kind for value in values_in(wanted)]
            return tuple(fx.node.map_aggregate(value, self._as_output) for value in wanted)

        return forward, [self.root, images]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False

    def proxy(self, node: fx.Node) -> TracedValue:
        return TracedValue(node, self)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        path, before = self.path_of_module(m), self._place
        self._place = f"{path} ({type(m).__name__})"
        known = tile_layer(m, self._grn_stats, self._layers)
        torchs_own = type(m).__module__.startswith("torch.nn") and not isinstance(m, _FOLLOWED)
        if all(isinstance(value.kind, Plain) for value in values_in(args, kwargs)):
            result: Any = self.emit("call_module", path, args, kwargs, Plain())
        elif known is not None or torchs_own:
            result = self._layer(path, m, known, args, kwargs)
        else:
            result = super().call_module(m, forward, args, kwargs)
        self._place = before
        if self._outputs is not None and path in self._outputs:
            self._reached[path] = result
            if len(self._reached) == len(set(self._outputs)):
                raise _AllReached
        return result

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: str | None = None,
        type_expr: Any = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        if kind == "get_attr":
            return self.emit(kind, target, args, kwargs, Plain(torch.empty_like(self._tensors[target], device="meta")))
        if kind not in ("call_function", "call_method"):
            return super().create_proxy(kind, target, args, kwargs, name, type_expr)
        called = target if isinstance(target, str) else target.__name__
        kinds = [value.kind for value in values_in(args, kwargs)]
        try:
            if any(isinstance(known, Unknown) for known in kinds):
                return self._refused((args, kwargs), "")
            if not any(isinstance(known, Map) for known in kinds):
                return self.emit(kind, target, args, kwargs, Plain(_example(kind, target, args, kwargs)))
            short = called if called.endswith("__") else called.rstrip("_")
            if short in POINTWISE:
                return pointwise(self, kind, target, args, kwargs)
            if short in RULES:
                return RULES[short](self, *args, **kwargs)
            raise Refused("it has no form on tiles")
        except (Refused, TypeError) as reason:
            return self._refused((args, kwargs), f"{self._place}: {called}() of a feature map: {reason}")

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            raise Refused("it uses a tensor that the forward makes; register it as a buffer")
        return super().create_arg(a)

    # What the rules for functions call

    def emit(self, op: str, target: Any, args: Any, kwargs: Any, kind: Kind, name: str | None = None) -> TracedValue:
        """A node of the graph."""
        value: Any = super().create_proxy(op, target, tuple(args), kwargs, name)
        value.kind = value.node.meta["kind"] = kind
        return value

    def seen_as(self, value: TracedValue, kind: Kind) -> TracedValue:
        """The same node in another role."""
        other = self.proxy(value.node)
        other.kind = kind
        return other

    def shape_of(self, value: TracedValue) -> tuple[Any, ...]:
        """The shape that the followed code believes a map to have."""
        kind = value.kind
        assert isinstance(kind, Map)
        batch = self.emit("call_method", "size", (value, 0), {}, Plain())
        height, width = (1 if kind.pooled else side // kind.stride for side in self._size)
        return (batch, kind.channels, height, width) if kind.channels_first else (batch, height, width, kind.channels)

    # The rest

    def _layer(self, path: str, layer: Any, known: TileLayer | None, args: Any, kwargs: Any) -> TracedValue:
        """A call of a layer that is known or refused."""
        arguments = (*args, *kwargs.values())
        kind = arguments[0].kind if isinstance(arguments[0], TracedValue) else Plain()
        reason = _why_not(layer, known, kind, len(arguments))
        result: Kind = Unknown()
        if isinstance(kind, Map):
            channels = getattr(layer, "out_channels", getattr(layer, "out_features", kind.channels))
            stride = kind.stride * _step(layer)
            result = kind.but(channels=channels, stride=stride, pooled=kind.pooled or bool(known and known.pools))
        if reason or not isinstance(kind, Map):
            problem = f"{self._place}: {reason}" if reason else ""
            return self.seen_as(self._refused((args, kwargs), problem), result)
        if known is None or known.run is None:
            return self.emit("call_module", path, args, kwargs, result)
        name = path.replace(".", "_")
        itself = self.emit("get_attr", path, (), {}, Plain(), f"{name}_layer")
        return self.emit("call_function", known.run, (itself, arguments[0], self.tiles), {}, result, name)

    def _refused(self, arguments: Any, problem: str) -> TracedValue:
        """Stands for a result that does not exist; it is an error only if an output depends on it."""
        value = self.emit("call_function", _unsupported, tuple(values_in(arguments)), {}, Unknown())
        if problem:
            self._problems[value.node] = problem
        return value

    def _as_output(self, value: Any) -> Any:
        """Pooled features get the shape that they have densely."""
        if not isinstance(value, TracedValue) or not isinstance(value.kind, Map) or not value.kind.pooled:
            return value
        rows = self.emit("call_method", "squeeze", (value, 1), {}, Plain())  # [B, 1, 1, C]
        return self.emit("call_method", "movedim", (rows, -1, 1), {}, Plain()) if value.kind.channels_first else rows


class _AllReached(Exception):
    """All wanted outputs are there; the rest of the forward does not matter."""


def _unsupported(*values: Any) -> None:
    raise AssertionError("a graph with refused operations is never run")


def _why_not(layer: Any, known: TileLayer | None, kind: Kind, arguments: int) -> str:
    """The reason why `layer` cannot run on tiles with such an input, or nothing."""
    if known is None:
        return "no masked form of this layer is known; `layers=` can give one"
    if reason := known.why_not(layer):
        return reason
    if known.run is not None and (layer._forward_hooks or layer._forward_pre_hooks):
        return "it has forward hooks, which would not run"
    if arguments != 1:
        return f"it is called with {arguments} arguments instead of one"
    if isinstance(kind, Plain):
        return "its input is not a feature map"
    if isinstance(kind, Unknown):
        return ""
    if known.expects == "map" and not kind.channels_first:
        return "it expects [B, C, H, W] and is given [B, H, W, C]"
    if known.expects == "rows" and kind.channels_first:
        return "it expects [B, H, W, C] and is given [B, C, H, W]"
    if kind.pooled and (_step(layer) > 1 or getattr(layer, "kernel_size", 1) not in (1, (1, 1))):
        return "it looks at neighbours of pooled features"
    return ""


def _in_place(node: fx.Node, module: nn.Module) -> bool:
    """Does it change a tensor that others may read, so that it matters although nobody uses its result?"""
    if node.op == "call_module":
        return getattr(module.get_submodule(str(node.target)), "inplace", False)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    changes = name.endswith("_") and not name.endswith("__")
    return node.op in ("call_method", "call_function") and (changes or node.kwargs.get("inplace") is True)


def _step(layer: Any) -> int:
    stride = getattr(layer, "stride", 1)
    return stride if isinstance(stride, int) else stride[0]


def _example(kind: str, target: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """What comes out for shapes, when those of all inputs are known."""

    def concrete(value: Any) -> Any:
        if not isinstance(value, TracedValue):
            return value
        if not isinstance(value.kind, Plain) or value.kind.example is None:
            raise LookupError
        return value.kind.example

    try:
        args, kwargs = fx.node.map_aggregate((tuple(args), dict(kwargs)), concrete)
        with torch.no_grad():
            result = getattr(args[0], target)(*args[1:], **kwargs) if kind == "call_method" else target(*args, **kwargs)
    except Exception:  # the shape stays unknown; whoever needs it says so
        return None
    return result if isinstance(result, torch.Tensor) else None
