"""Turns a plain CNN into one that computes visible tiles only.

Legend: B batch, K visible cells, t tile side, C channels, H W image.
"""

import linecache
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from fastmim.layers.masked_grn import GRN_STATS
from fastmim.layers.tile_layers import LayerFunction
from fastmim.layers.tile_tracer import TileTracer
from fastmim.layers.traced import Map
from fastmim.ops import TileIndex, gather_tiles

__all__ = ["SparseModule", "TileOutput", "sparsify", "stage_names"]

# Stand-ins for the image size while tracing; two of them, to notice a forward that computes with its size.
_SIZES = ((64 * 7, 64 * 9), (64 * 11, 64 * 13))


class TileOutput(NamedTuple):
    """One named output of a SparseModule: tiles [B, K, t, t, channels] with t = cell / stride."""

    name: str
    channels: int
    stride: int  # pixels per position


class SparseModule(nn.Module):
    """The layers of a dense module, run on tiles. Made by `sparsify`.

    It holds the very layers of the dense module, not copies: the same parameters and buffers under the same names, so
    training one trains the other, and `to`, `train`, `load_state_dict` on either are seen by both. Where a module owns
    both of them, keep this one out of its state dict (in a tuple).
    """

    outputs: tuple[TileOutput, ...]
    """The named outputs that were asked for, in that order; empty without."""

    def __init__(
        self,
        module: nn.Module,
        outputs: str | Sequence[str] | None,
        grn_stats: str,
        layers: Mapping[type, LayerFunction],
    ) -> None:
        super().__init__()
        self._recipe = (module, outputs, grn_stats, layers)  # a tuple, which nn.Module does not look into
        for shared in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.__dict__[shared] = module.__dict__[shared]
        # A single layer has no forward to follow; that of a sequence around it calls it.
        self._root = (module if any(True for _ in module.children()) else nn.Sequential(module),)
        self._graphs, self.outputs = _graphs(self._root[0], outputs, grn_stats, layers)
        self._forwards = {mode: _compiled(graph, type(module).__name__) for mode, graph in self._graphs.items()}

    def forward(self, images: Tensor, tiles: TileIndex) -> Any:
        """What the dense module returns, of visible cells only.

        Args:
            images: [B, C, H, W], of which the visible cells are taken; or tiles [B, K, t, t, C].
            tiles: the visible cells, of one image size over one grid: cells are squares of any size that the total
                stride of the module divides.

        Returns:
            The dense module's result, in which feature maps are tiles [B, K, t, t, C] in the order of
            `tiles.ids_keep`, and pooled features are means over visible positions. With named outputs: their tuple,
            or the one tensor for a single name.
        """
        x = images if images.dim() == 5 else gather_tiles(images, tiles)
        return self._forwards[self.training](*self._root, x, tiles)

    @property
    def code(self) -> str:
        """The forward as Python: what runs, operation by operation."""
        return self._graphs[self.training].python_code("self").src

    @property
    def training(self) -> bool:  # type: ignore[override]
        """That of the dense module."""
        return self._recipe[0].training

    @training.setter
    def training(self, mode: bool) -> None:
        if "_recipe" in self.__dict__:  # not while nn.Module starts
            self._recipe[0].training = mode

    def __reduce__(self) -> tuple[Any, ...]:
        return SparseModule, self._recipe  # copies and pickles follow the forward of the copied module anew


def sparsify(
    module: nn.Module,
    *,
    outputs: str | Sequence[str] | None = None,
    grn_stats: str = "image",
    layers: Mapping[type, LayerFunction] | None = None,
) -> SparseModule:
    """Turn a plain CNN into one that computes visible tiles only.

    The forward of `module` is followed once with torch.fx, and every operation in it replaced by its masked form;
    masks reach them as an argument. ResNets and ConvNeXts of fastmim, timm and torchvision work, and whatever else is
    made of: Conv2d (1x1; patches; k x k with padding k // 2, stride 1 or 2, dense or depthwise), batch, group, layer
    and global response norm, pooling, squeeze and excitation, linear layers on channels-last maps, activations,
    dropout, stochastic depth, and the functions of torch that match them.

    Args:
        module: the dense module, [B, C, H, W] -> features. It stays as it is and shares its layers with the result.
        outputs: names of submodules whose outputs are wanted (`stage_names(module)` for all four stages); nothing
            after the last of them is computed. What the forward returns when None.
        grn_stats: "image", or "batch" for ConvNeXt V2's pre-training code (see `MaskedGRN`).
        layers: how further types of layers run on tiles: type -> function (layer, x, tiles) -> x, with x
            [B, K, t, t, C]. Numbers of channels and strides are read from `out_channels` and `stride`, if it has them.

    Returns:
        A module with the same state dict, called as `sparse(images, tiles)`.

    Raises:
        ValueError: everything in the forward that cannot run on tiles, by name, each with its reason; or an output
            that does not exist.
    """
    if grn_stats not in GRN_STATS:
        raise ValueError(f"sparsify: grn_stats must be one of {', '.join(GRN_STATS)}, got {grn_stats!r}")
    names = dict(module.named_modules())
    for name in (outputs,) if isinstance(outputs, str) else outputs or ():
        if name not in names:
            raise ValueError(f"sparsify: {type(module).__name__} has no submodule {name!r} to take an output from")
    return SparseModule(module, outputs, grn_stats, dict(layers or {}))


def stage_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the four stages of a ResNet or ConvNeXt of fastmim, timm or torchvision.

    Raises:
        ValueError: a module with other stages.
    """
    names = {name for name, _ in module.named_modules()}
    for pattern, places in (("layer{}", (1, 2, 3, 4)), ("stages.{}", (0, 1, 2, 3)), ("features.{}", (1, 3, 5, 7))):
        stages = tuple(pattern.format(place) for place in places)
        if names.issuperset(stages) and ("features" not in pattern or type(module).__name__ == "ConvNeXt"):
            return stages
    raise ValueError(
        f"{type(module).__name__} has no stages layer1 to layer4 or stages.0 to stages.3; name the submodules whose "
        "outputs are wanted"
    )


def _graphs(
    module: nn.Module, outputs: str | Sequence[str] | None, grn_stats: str, layers: Mapping[type, LayerFunction]
) -> tuple[dict[bool, fx.Graph], tuple[TileOutput, ...]]:
    """The forward for training and for evaluation, and what comes out."""
    wanted = (outputs,) if isinstance(outputs, str) else None if outputs is None else tuple(outputs)

    def follow(mode: bool, size: tuple[int, int]) -> tuple[fx.Graph, TileTracer]:
        tracer = TileTracer(wanted, size, grn_stats, layers)
        with _mode(module, mode):
            graph, problems = tracer.follow(module)
        if problems:
            lines = "".join(f"\n  - {problem}" for problem in dict.fromkeys(problems))
            raise ValueError(f"sparsify: {type(module).__name__} cannot run on tiles:{lines}")
        return graph, tracer

    graphs, other_size = {}, follow(True, _SIZES[1])[0]
    for mode in (True, False):
        graphs[mode], tracer = follow(mode, _SIZES[0])
    if _source(graphs[True]) != _source(other_size):
        raise ValueError(
            f"sparsify: the forward of {type(module).__name__} computes with the height or width of a feature map, "
            "which tiles do not have"
        )
    if isinstance(outputs, str):
        for graph in graphs.values():
            node = next(iter(reversed(graph.nodes)))
            node.args = (node.args[0][0],)
    named = zip(wanted or (), tracer.kinds, strict=True) if wanted else ()
    return graphs, tuple(
        TileOutput(name, kind.channels or 0, kind.stride) for name, kind in named if isinstance(kind, Map)
    )


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Every submodule in the given mode, for a while."""
    modes = {child: child.training for child in module.modules()}
    try:
        for child in modes:
            child.training = training
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode


def _source(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def _compiled(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """The graph as a function (module, x, tiles), whose lines show in tracebacks."""
    code = graph.python_code("self")
    place = f"<{name} on tiles {id(graph):x}>"
    linecache.cache[place] = (len(code.src), None, code.src.splitlines(keepends=True), place)
    names = dict(code.globals)
    exec(compile(code.src, place, "exec"), names)
    return names["forward"]
