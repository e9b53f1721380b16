"""The layers that `sparsify` knows, and how each of them runs on tiles.

Legend: B batch, K visible cells, t tile side, C channels.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from fastmim.layers.linear import Linear
from fastmim.layers.masked_batch_norm import MaskedBatchNorm2d
from fastmim.layers.masked_conv import MaskedConv2d
from fastmim.layers.masked_grn import grn_on_tiles
from fastmim.layers.masked_norm import MaskedGroupNorm, MaskedLayerNorm2d
from fastmim.layers.masked_pool import MaskedAdaptiveAvgPool2d, MaskedAvgPool2d, MaskedMaxPool2d
from fastmim.ops import TileIndex, linear

__all__ = ["LayerFunction", "TileLayer", "drop_path_factor", "drop_path_on_tiles", "tile_layer"]

LayerFunction = Callable[[Any, Tensor, TileIndex], Tensor]
"""(layer, x [B, K, t, t, C], tiles) -> what the layer makes of x, as tiles."""


class TileLayer(NamedTuple):
    """How a layer runs on tiles."""

    run: LayerFunction | None  # None: the layer itself, because it treats every visible position alike
    expects: Literal["map", "rows", "any"] = "any"  # the dense layer's input: [B, C, H, W], [B, H, W, C], either
    why_not: Callable[[Any], str] = lambda layer: ""  # the reason why this one cannot, or nothing
    pools: bool = False  # leaves one position an image


def tile_layer(layer: nn.Module, grn_stats: str, others: Mapping[type, LayerFunction]) -> TileLayer | None:
    """How `layer` runs on tiles, None if that is not known. `others` come first."""
    if type(layer) in others:
        return TileLayer(others[type(layer)])
    name = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if name in _LAYER_NORMS:
        return TileLayer(_run(MaskedLayerNorm2d), "map")
    if name == _BATCH_NORM:
        return _KNOWN[nn.BatchNorm2d]
    if name in _RESPONSE_NORMS:
        return TileLayer(_grn_of_batch if grn_stats == "batch" else _grn_of_image)
    if type(layer).__name__ in _DROP_PATHS and isinstance(_drop_rate(layer), float | int):
        return TileLayer(drop_path_on_tiles)
    for base, known in _KNOWN.items():
        if isinstance(layer, base) and _computes_as(base, layer):
            hooked = bool(layer._forward_hooks or layer._forward_pre_hooks)
            return TileLayer(None, "rows") if base is nn.Linear and hooked else known
    return None


def _computes_as(base: type[nn.Module], layer: nn.Module) -> bool:
    """Does `layer` inherit from `base` without changing what it computes?"""
    own = type(layer)
    names = ("forward", "_conv_forward", "_check_input_dim")
    return all(getattr(own, name, None) is getattr(base, name, None) for name in names)


def _run(masked: Any) -> LayerFunction:
    """The forward of a masked layer needs only the attributes of its dense base, so it can run that one too."""
    return masked.forward


def _linear(layer: Any, x: Tensor, tiles: TileIndex) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _grn_of_image(layer: Any, x: Tensor, tiles: TileIndex) -> Tensor:
    return grn_on_tiles(x, layer.weight, layer.bias, layer.eps, "image")


def _grn_of_batch(layer: Any, x: Tensor, tiles: TileIndex) -> Tensor:
    return grn_on_tiles(x, layer.weight, layer.bias, layer.eps, "batch")


def _global_max_pool(layer: Any, x: Tensor, tiles: TileIndex) -> Tensor:
    return x.amax((1, 2, 3), keepdim=True)


def _drop_rate(layer: Any) -> Any:
    return getattr(layer, "drop_prob", getattr(layer, "p", None))


def drop_path_on_tiles(layer: Any, x: Tensor, tiles: TileIndex) -> Tensor:
    """Stochastic depth: a branch dropped for whole images (or for the whole batch, torchvision's mode "batch")."""
    factor = drop_path_factor(layer, x)
    return x if factor is None else x * factor.reshape(-1, 1, 1, 1, 1)


def drop_path_factor(layer: Any, x: Tensor) -> Tensor | None:
    """[B], what stochastic depth multiplies each image of a branch by; None where it changes nothing."""
    rate = _drop_rate(layer)
    if not layer.training or rate == 0:
        return None
    of_batch = getattr(layer, "mode", "row") == "batch"
    factor = x.new_empty((1 if of_batch else x.shape[0],)).bernoulli_(1 - rate)
    if rate < 1 and getattr(layer, "scale_by_keep", True):
        factor.div_(1 - rate)
    return factor.expand(x.shape[0])


def _over_channels(layer: nn.LayerNorm | nn.RMSNorm) -> str:
    shape = tuple(layer.normalized_shape)
    return "" if len(shape) == 1 else f"it normalises over {shape}, only channels are supported"


_KNOWN: dict[type[nn.Module], TileLayer] = {
    nn.Conv2d: TileLayer(_run(MaskedConv2d), "map", MaskedConv2d.why_not),
    nn.BatchNorm2d: TileLayer(_run(MaskedBatchNorm2d), "map"),
    nn.SyncBatchNorm: TileLayer(_run(MaskedBatchNorm2d), "map"),
    nn.GroupNorm: TileLayer(_run(MaskedGroupNorm), "map"),
    nn.MaxPool2d: TileLayer(_run(MaskedMaxPool2d), "map", MaskedMaxPool2d.why_not),
    nn.AvgPool2d: TileLayer(_run(MaskedAvgPool2d), "map", MaskedAvgPool2d.why_not),
    nn.AdaptiveAvgPool2d: TileLayer(_run(MaskedAdaptiveAvgPool2d), "map", MaskedAdaptiveAvgPool2d.why_not, pools=True),
    nn.AdaptiveMaxPool2d: TileLayer(_global_max_pool, "map", MaskedAdaptiveAvgPool2d.why_not, pools=True),
    nn.LayerNorm: TileLayer(None, "rows", _over_channels),
    nn.RMSNorm: TileLayer(None, "rows", _over_channels),
    nn.Linear: TileLayer(_linear, "rows"),
    Linear: TileLayer(None, "rows"),
    **dict.fromkeys(
        (
            nn.CELU,
            nn.Dropout,
            nn.ELU,
            nn.GELU,
            nn.Hardsigmoid,
            nn.Hardswish,
            nn.Hardtanh,
            nn.Identity,
            nn.LeakyReLU,
            nn.Mish,
            nn.ReLU,
            nn.ReLU6,
            nn.SELU,
            nn.SiLU,
            nn.Sigmoid,
            nn.Softplus,
            nn.Tanh,
        ),
        TileLayer(None),
    ),
}

# Layers of other packages by name, so that nobody has to import them.
_LAYER_NORMS = (
    "fastmim.models.norms.LayerNorm2d",
    "timm.layers.norm.LayerNorm2d",
    "torchvision.models.convnext.LayerNorm2d",
)
_BATCH_NORM = "fastmim.models.norms.BatchNorm2d"
_RESPONSE_NORMS = ("fastmim.models.norms.GlobalResponseNorm", "timm.layers.grn.GlobalResponseNorm")
_DROP_PATHS = ("DropPath", "StochasticDepth")
