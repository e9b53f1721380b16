"""Fixed position embeddings and relative position indices, against their definitions written out."""

import math

import pytest
import torch

from fastmim.layers.relative_positions import num_relative_positions, relative_position_index, visible_pairs
from fastmim.layers.sincos_positions import sincos_positions


@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (14, 14)])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_sincos_is_column_then_row_each_sine_then_cosine(grid, prefix):
    width, (gh, gw) = 16, grid
    positions = sincos_positions(width, grid, prefix)
    assert positions.shape == (1, prefix + gh * gw, width)
    assert positions.dtype == torch.float32
    assert not positions[0, :prefix].any()
    for row in (0, gh - 1):
        for column in (0, gw - 1):
            expected = []
            for coordinate in (column, row):
                angles = [coordinate / 10000 ** (i / 4) for i in range(4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            torch.testing.assert_close(positions[0, prefix + row * gw + column], torch.tensor(expected))


def test_sincos_names_a_width_that_does_not_divide():
    with pytest.raises(ValueError, match="divisible by 4, but the width is 18"):
        sincos_positions(18, (2, 2))


@pytest.mark.parametrize("grid", [(3, 5), (4, 4), (1, 2), (1, 1)])
def test_relative_index_is_one_row_for_each_displacement(grid):
    gh, gw = grid
    index = relative_position_index(grid)
    rows = num_relative_positions(grid)
    assert index.shape == (1 + gh * gw, 1 + gh * gw)
    seen = {}
    for query in range(gh * gw):
        for key in range(gh * gw):
            displacement = (query // gw - key // gw, query % gw - key % gw)
            assert seen.setdefault(displacement, index[1 + query, 1 + key].item()) == index[1 + query, 1 + key].item()
    assert len(set(seen.values())) == len(seen) == rows - 3
    assert (index[0, 1:] == rows - 3).all()
    assert (index[1:, 0] == rows - 2).all()
    assert index[0, 0] == rows - 1


def test_visible_pairs_keeps_cls_and_the_order_of_the_ids():
    index = relative_position_index((2, 3))
    pairs = visible_pairs(index, torch.tensor([[4, 0], [5, 3]]))
    for image, tokens in enumerate([[0, 5, 1], [0, 6, 4]]):
        assert torch.equal(pairs[image], index[tokens][:, tokens])
