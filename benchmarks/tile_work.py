"""What layers on tiles have to compute and to move, counted from the neighbour table: taps on masked cells are none.

Legend: B batch, K visible cells, t tile side, s stride, C input and O output channels, k kernel side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmim.ops import TileIndex, masked_conv2d

__all__ = ["Work", "conv_work", "encoder_work", "joined", "total"]

WEIGHT_BYTES = 4  # parameters are fp32, under autocast too


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes of a layer: each tensor once for each operation that needs it."""

    flops: Mapping[str, int]
    moved: Mapping[str, int]


def joined(tiles: TileIndex, side: int, kernel: int, stride: int = 1, padding: int | None = None) -> int:
    """Pairs of a visible output position and a visible input position that a k x k kernel joins; side: t."""
    if padding == 0:  # windows that stay in their own tile
        return tiles.batch * tiles.count * (side // stride) ** 2 * kernel**2
    ones = torch.ones(tiles.batch, tiles.count, side, side, 1, dtype=torch.float64, device=tiles.device)
    weight = torch.ones(1, 1, kernel, kernel, dtype=torch.float64, device=tiles.device)
    return int(masked_conv2d(ones, weight, None, tiles, stride, backend="reference").sum())


def conv_work(
    pairs: int, inputs: int, outputs: int, weight: Sequence[int], itemsize: int, *, weight_bytes: int, first: bool
) -> Work:
    """Work of one convolution.

    Args:
        pairs: `joined`.
        inputs, outputs: values of x and of the result.
        weight: its shape, [O, C / groups, k, k].
        itemsize, weight_bytes: bytes of a value of x and of the weight.
        first: the input needs no gradient.

    Forward multiplies each pair and reads x and weight, writes the result; backward does so for each of the two
    gradients, reads the result's gradient, x and weight, and writes the gradients of x and weight.
    """
    flops = 2 * pairs * weight[0] * weight[1]
    x, out, parameters = inputs * itemsize, outputs * itemsize, _product(weight) * weight_bytes
    forward = x + parameters + out
    backward = out + x + parameters + (0 if first else x + parameters)
    return Work(
        {"forward": flops, "both": (2 if first else 3) * flops}, {"forward": forward, "both": forward + backward}
    )


def total(works: Sequence[Work]) -> Work:
    return Work(
        {name: sum(work.flops[name] for work in works) for name in ("forward", "both")},
        {name: sum(work.moved[name] for work in works) for name in ("forward", "both")},
    )


def encoder_work(encoder: nn.Module, tiles: TileIndex, size: int, itemsize: int) -> Work:
    """Work on visible tiles of the convolutions and linear layers that lead to the last map; norms and activations,
    which compute little, are left out.

    Args:
        encoder: a plain one of benchmarks/baselines; its layers and their sizes are taken from a dense forward.
        tiles: the visible cells.
        size: of the square images.
        itemsize: bytes of a value of a map.
    """
    cell, found = size // tiles.grid[0], []
    known: dict[tuple[int, ...], int] = {}

    def convolution(layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        side, kernel, stride = inputs[0].shape[2] // tiles.grid[0], layer.kernel_size[0], layer.stride[0]
        padding = int(layer.padding[0])
        key = (side, kernel, stride, padding)
        known[key] = known.get(key) or joined(tiles, *key)
        rows = tiles.batch * tiles.count
        values = rows * side**2 * layer.in_channels, rows * (side // stride) ** 2 * layer.out_channels
        found.append(
            conv_work(known[key], *values, layer.weight.shape, itemsize, weight_bytes=WEIGHT_BYTES, first=side == cell)
        )

    def linear(layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        side = inputs[0].shape[1] // tiles.grid[0]  # channels-last maps
        rows = tiles.batch * tiles.count * side**2
        values = rows * layer.in_features, rows * layer.out_features
        found.append(conv_work(rows, *values, layer.weight.shape, itemsize, weight_bytes=WEIGHT_BYTES, first=False))

    hooks = [
        module.register_forward_hook(convolution if isinstance(module, nn.Conv2d) else linear)  # type: ignore[arg-type]
        for module in encoder.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    training, weight = encoder.training, next(encoder.parameters())
    try:
        image = weight.new_zeros((1, 3, size, size))
        with torch.no_grad():
            encoder.eval().forward_map(image, lambda x: x)  # type: ignore[operator]
    finally:
        encoder.train(training)
        for hook in hooks:
            hook.remove()
    return total(found)


def _product(shape: Sequence[int]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count
