"""What layers on tiles compute and move, counted in another way."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_masked_encoder import drawn, encoders
from benchmarks.tile_work import conv_work, encoder_work, joined
from fastmim.ops import TileIndex


def index(keep, grid=(2, 3), batch=2):
    return TileIndex.from_ids_keep(drawn(batch, grid[0] * grid[1], keep, torch.tensor([0, 0, 0]))[0], grid)


@pytest.mark.parametrize("side, kernel, stride, padding", [(4, 3, 1, 1), (2, 7, 1, 3), (4, 7, 2, 3), (4, 2, 2, 0)])
def test_joined_counts_every_pair_once(side, kernel, stride, padding):
    tiles = index(3)
    pairs = 0
    for cells in tiles.ids_keep.tolist():
        seen = {
            (cell // 3 * side + y, cell % 3 * side + x)
            for cell, y, x in itertools.product(cells, range(side), range(side))
        }
        for y, x, dy, dx in itertools.product(range(2 * side), range(3 * side), range(kernel), range(kernel)):
            meets = (y + padding - dy) % stride == 0 and (x + padding - dx) % stride == 0
            out = (y + padding - dy) // stride, (x + padding - dx) // stride
            visible_out = (out[0] * stride, out[1] * stride) in seen  # an output's cell is that of its first input
            pairs += meets and visible_out and (y, x) in seen
    assert joined(tiles, side, kernel, stride, padding) == pairs


def test_work_of_a_convolution():
    work = conv_work(10, 6, 8, (4, 3, 1, 1), 2, weight_bytes=4, first=False)
    assert work.flops == {"forward": 240, "both": 720}
    assert work.moved == {"forward": 12 + 48 + 16, "both": 3 * 12 + 3 * 48 + 2 * 16}
    first = conv_work(10, 6, 8, (4, 3, 1, 1), 2, weight_bytes=4, first=True)
    assert first.flops["both"] == 480
    assert first.moved["both"] == 2 * 12 + 2 * 48 + 2 * 16


def test_work_of_an_encoder():
    encoder = encoders("resnet18", 64)[1]
    with FlopCounterMode(display=False) as dense, torch.no_grad():
        encoder.forward_map(torch.zeros(2, 3, 64, 64), lambda x: x)
    everything = encoder_work(encoder, index(4, (2, 2)), 64, 4)
    # A dense convolution also multiplies the zeros around the map, which at 2 x 2 positions are most of it.
    assert 0.4 * dense.get_total_flops() < everything.flops["forward"] < dense.get_total_flops()
    half = encoder_work(encoder, index(2, (2, 2)), 64, 4)
    assert half.flops["forward"] < everything.flops["forward"] / 2  # taps on masked neighbours vanish too
    assert half.moved["forward"] > everything.moved["forward"] / 2  # weights are read all the same
    assert not any(module._forward_hooks for module in encoder.modules())
