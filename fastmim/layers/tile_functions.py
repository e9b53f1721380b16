"""Functions of torch that a forward may call on a feature map, and what becomes of them on tiles.

Each rule has the signature of its function, after the tracer; names are those that torch.fx gives, without a trailing
underscore. A rule that finds no meaning on tiles raises `Refused` with the reason.

Legend: B batch, K visible cells, t tile side, C channels, H W map.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastmim.layers.masked_conv import conv2d_on_tiles, why_no_conv2d
from fastmim.layers.masked_norm import group_norm_on_tiles
from fastmim.layers.masked_pool import MaskedAvgPool2d, MaskedMaxPool2d
from fastmim.layers.traced import Map, Plain, Refused, TracedValue, values_in
from fastmim.ops import linear, masked_avg_pool2d, masked_max_pool2d

__all__ = ["POINTWISE", "RULES", "pointwise"]

_POINTWISE = """
    abs add addcdiv addcmul bfloat16 celu clamp clamp_max clamp_min clone cos detach div dropout elu eq erf exp float
    ge gelu gt half hardsigmoid hardswish hardtanh le leaky_relu lerp log log1p logical_not lt maximum minimum mish mul
    ne neg pow reciprocal relu relu6 rsqrt rsub selu sigmoid sign silu sin softplus sqrt square sub tanh to true_divide
    truediv type_as where
"""
POINTWISE = frozenset(_POINTWISE.split())


def pointwise(tracer: Any, kind: str, target: Any, args: Any, kwargs: Any) -> TracedValue:
    """A function of every element by itself: the same function on tiles, constants brought to channels last."""
    maps = [value.kind for value in values_in(args, kwargs) if isinstance(value.kind, Map)]
    first = maps[0]
    if any(other.channels_first != first.channels_first for other in maps):
        raise Refused("it mixes maps of channels first and channels last")
    full = [other for other in maps if not other.pooled]
    if len({other.stride for other in full}) > 1:
        raise Refused(f"it mixes maps of strides {sorted({other.stride for other in full})}")

    def on_tiles(value: Any) -> Any:
        return _constant(tracer, value, first) if isinstance(value, TracedValue) else value

    kwargs = {key: value for key, value in kwargs.items() if key != "memory_format"}
    args, kwargs = fx.node.map_aggregate((tuple(args), kwargs), on_tiles)
    channels = None if any(other.channels is None for other in maps) else max(other.channels or 0 for other in maps)
    result = (full or maps)[0].but(channels=channels)
    return tracer.emit(kind, target, args, kwargs, result)


def _constant(tracer: Any, value: TracedValue, other: Map) -> TracedValue:
    """`value`, which meets a map in a pointwise function, in a shape that means the same beside tiles."""
    if isinstance(value.kind, Map):
        return value
    shape = value.shape if isinstance(value.kind, Plain) and value.kind.example is not None else None
    if shape is None:
        raise Refused("it combines a map with a tensor whose shape depends on the input")
    padded = (1,) * (4 - len(shape)) + shape
    if len(shape) > 4 or padded[0] != 1 or any(padded[dim] != 1 for dim in other.spatial):
        raise Refused(f"it combines a map with a tensor {list(shape)} that differs between positions or images")
    if not other.channels_first or len(shape) < 3:
        return value
    return tracer.emit("call_method", "movedim", (value, -3, -1), {}, Plain())


def _dims(x: TracedValue, dim: Any) -> frozenset[int]:
    dims = range(4) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    return frozenset(d % 4 for d in dims)


def _reduced(
    tracer: Any, x: TracedValue, function: Callable[..., Any], dim: Any, keepdim: bool, **options: Any
) -> TracedValue:
    """A reduction over the positions of each image, over channels, or over both."""
    kind, dims = _map(x), _dims(x, dim)
    over_positions = kind.spatial <= dims
    if 0 in dims or (not over_positions and dims & kind.spatial) or (not keepdim and not over_positions):
        raise Refused(
            f"dimensions {sorted(dims)} (keepdim={keepdim}); only all positions of an image, or channels with "
            "keepdim=True, can be reduced"
        )
    over_channels = kind.channel in dims
    on_tiles = (1, 2, 3) * over_positions + (4,) * over_channels
    result: Map | Plain = kind.but(channels=1 if over_channels else kind.channels, pooled=kind.pooled or over_positions)
    if not keepdim:
        result = Plain()
    options = {key: value for key, value in options.items() if value is not None}
    return tracer.emit("call_function", function, (x,), {"dim": on_tiles, "keepdim": keepdim, **options}, result)


def _mean(tracer: Any, x: TracedValue, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> TracedValue:
    return _reduced(tracer, x, torch.mean, dim, keepdim, dtype=dtype)


def _sum(tracer: Any, x: TracedValue, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> TracedValue:
    return _reduced(tracer, x, torch.sum, dim, keepdim, dtype=dtype)


def _amax(tracer: Any, x: TracedValue, dim: Any = None, keepdim: bool = False) -> TracedValue:
    return _reduced(tracer, x, torch.amax, dim, keepdim)


def _var(
    tracer: Any,
    x: TracedValue,
    dim: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    *,
    correction: int | None = None,
) -> TracedValue:
    correction = int(unbiased) if correction is None else correction
    return _reduced(tracer, x, torch.var, dim, keepdim, correction=correction)


def _norm(
    tracer: Any,
    x: TracedValue,
    p: Any = "fro",
    dim: Any = None,
    keepdim: bool = False,
    out: None = None,
    dtype: Any = None,
) -> TracedValue:
    order = 2 if p == "fro" else p
    return _reduced(tracer, x, torch.linalg.vector_norm, dim, keepdim, ord=order, dtype=dtype)


def _vector_norm(
    tracer: Any, x: TracedValue, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> TracedValue:
    return _reduced(tracer, x, torch.linalg.vector_norm, dim, keepdim, ord=ord, dtype=dtype)


def _adaptive_avg_pool2d(tracer: Any, x: TracedValue, output_size: Any) -> TracedValue:
    return _mean(tracer, _global(x, output_size), (2, 3), keepdim=True)


def _adaptive_max_pool2d(tracer: Any, x: TracedValue, output_size: Any, return_indices: bool = False) -> TracedValue:
    if return_indices:
        raise Refused("return_indices is not supported")
    return _amax(tracer, _global(x, output_size), (2, 3), keepdim=True)


def _global(x: TracedValue, output_size: Any) -> TracedValue:
    if not _map(x).channels_first or output_size not in (1, (1, 1), [1, 1]):
        raise Refused(f"output_size is {output_size}; only pooling of a map [B, C, H, W] to 1 is supported")
    return x


def _permute(tracer: Any, x: TracedValue, *dims: Any, **named: Any) -> TracedValue:
    kind, given = _map(x), named.get("dims", dims)
    order = tuple(d % 4 for d in (given[0] if len(given) == 1 else given))
    if order == (0, 1, 2, 3):
        return x
    if order == ((0, 2, 3, 1) if kind.channels_first else (0, 3, 1, 2)):
        return tracer.seen_as(x, kind.but(channels_first=not kind.channels_first))
    raise Refused(f"order {order}; tiles can only be seen as [B, C, H, W] or [B, H, W, C]")


def _movedim(tracer: Any, x: TracedValue, source: int, destination: int) -> TracedValue:
    source, destination = source % 4, destination % 4
    order = [d for d in range(4) if d != source]
    order.insert(destination, source)
    return _permute(tracer, x, *order)


def _contiguous(tracer: Any, x: TracedValue, memory_format: Any = None) -> TracedValue:
    return x  # tiles are


def _flatten(tracer: Any, x: TracedValue, start_dim: int = 0, end_dim: int = -1) -> TracedValue:
    if not _map(x).pooled or start_dim != 1 or end_dim not in (-1, 3):
        raise Refused("only pooled features can be flattened, from dimension 1 on")
    return tracer.emit("call_function", torch.flatten, (x, 1), {}, Plain())


def _reshape(tracer: Any, x: TracedValue, *shape: Any) -> TracedValue:
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
    channels = _map(x).channels
    keeps_images = isinstance(sizes[0], TracedValue) or (sizes[0] == -1 and sizes[1:] == (channels,))
    if not _map(x).pooled or len(sizes) != 2 or not keeps_images or sizes[1] not in (-1, channels):
        raise Refused("only pooled features can be reshaped, to [B, C]")
    return tracer.emit("call_function", torch.flatten, (x, 1), {}, Plain())


def _linear(tracer: Any, x: TracedValue, weight: Any, bias: Any = None) -> TracedValue:
    kind = _map(x)
    if kind.channels_first:
        raise Refused("it acts on the width of a map [B, C, H, W]")
    return tracer.emit("call_function", linear, (x, weight, bias), {}, kind.but(channels=_shape(weight)[0]))


def _layer_norm(
    tracer: Any, x: TracedValue, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> TracedValue:
    kind = _map(x)
    if kind.channels_first or len(normalized_shape) != 1:
        raise Refused(f"it normalises over {list(normalized_shape)}; only channels of [B, H, W, C] are supported")
    return tracer.emit("call_function", F.layer_norm, (x, normalized_shape, weight, bias, eps), {}, kind)


def _group_norm(
    tracer: Any, x: TracedValue, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> TracedValue:
    kind = _first(x)
    return tracer.emit("call_function", group_norm_on_tiles, (x, num_groups, weight, bias, eps), {}, kind)


def _conv2d(
    tracer: Any,
    x: TracedValue,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> TracedValue:
    kind, shape = _first(x), _shape(weight)
    if reason := why_no_conv2d(shape, stride, padding, dilation, groups):
        raise Refused(reason)
    if kind.pooled and shape[2] > 1:
        raise Refused("it looks at neighbours of pooled features")
    step = stride if isinstance(stride, int) else stride[0]
    result = kind.but(channels=shape[0], stride=kind.stride * step)
    args = (x, weight, bias, stride, padding, dilation, groups)
    return tracer.emit("call_function", conv2d_on_tiles, args, {"tiles": tracer.tiles}, result)


def _max_pool2d(
    tracer: Any,
    x: TracedValue,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> TracedValue:
    layer = nn.MaxPool2d(kernel_size, stride, padding, dilation, return_indices, ceil_mode)
    return _pool(tracer, x, masked_max_pool2d, layer, MaskedMaxPool2d.why_not(layer))


def _avg_pool2d(
    tracer: Any,
    x: TracedValue,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> TracedValue:
    layer = nn.AvgPool2d(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return _pool(tracer, x, masked_avg_pool2d, layer, MaskedAvgPool2d.why_not(layer))


def _pool(tracer: Any, x: TracedValue, function: Callable[..., Any], layer: Any, reason: str) -> TracedValue:
    kind = _first(x)
    if reason or kind.pooled:
        raise Refused(reason or "the features are pooled already")
    sizes = (layer.kernel_size, layer.stride, layer.padding)
    kernel, stride, padding = (size if isinstance(size, int) else size[0] for size in sizes)
    args = (x, tracer.tiles, kernel, stride, padding)
    return tracer.emit("call_function", function, args, {}, kind.but(stride=kind.stride * stride))


def _cat(tracer: Any, tensors: Any, dim: int = 0) -> TracedValue:
    kinds = [_map(value) for value in tensors]
    first = kinds[0]
    if dim % 4 != first.channel or len({kind.but(channels=0) for kind in kinds}) > 1:
        raise Refused("only maps of one size and layout can be joined, by their channels")
    channels = None if any(kind.channels is None for kind in kinds) else sum(kind.channels or 0 for kind in kinds)
    return tracer.emit("call_function", torch.cat, (tensors, -1), {}, first.but(channels=channels))


def _getattr(tracer: Any, x: TracedValue, name: str) -> TracedValue:
    if name not in ("device", "dtype"):
        raise Refused(f"its attribute {name!r} is read")
    return tracer.emit("call_function", getattr, (x, name), {}, Plain())


def _map(x: Any) -> Map:
    if not isinstance(x, TracedValue) or not isinstance(x.kind, Map):
        raise Refused("a map is given where a constant is expected")
    return x.kind


def _first(x: Any) -> Map:
    kind = _map(x)
    if not kind.channels_first:
        raise Refused("it expects [B, C, H, W] and is given [B, H, W, C]")
    return kind


def _shape(weight: Any) -> tuple[int, ...]:
    if isinstance(weight, TracedValue) and isinstance(weight.kind, Plain) and weight.kind.example is not None:
        return tuple(weight.kind.example.shape)
    raise Refused("its weight is not a parameter")


RULES: dict[str, Callable[..., TracedValue]] = {
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "adaptive_max_pool2d": _adaptive_max_pool2d,
    "amax": _amax,
    "avg_pool2d": _avg_pool2d,
    "cat": _cat,
    "concat": _cat,
    "contiguous": _contiguous,
    "conv2d": _conv2d,
    "flatten": _flatten,
    "getattr": _getattr,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "linalg_vector_norm": _vector_norm,
    "linear": _linear,
    "max_pool2d": _max_pool2d,
    "mean": _mean,
    "moveaxis": _movedim,
    "movedim": _movedim,
    "norm": _norm,
    "permute": _permute,
    "reshape": _reshape,
    "sum": _sum,
    "var": _var,
    "view": _reshape,
}
