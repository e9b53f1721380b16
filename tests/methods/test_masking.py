import pytest
import torch

from fastmim.methods.masking import cell_grid, check_cell, choose_cell, count_kept, removed_pixels, removed_tokens


@pytest.mark.parametrize(
    "cells, ratio, rounding, kept",
    [
        (49, 0.6, "ceil", 19),  # A²MIM, SimMIM at 224: 30 removed
        (36, 0.6, "ceil", 14),  # at 192: 22 removed
        (196, 0.75, "floor", 49),  # MAE ViT/16
        (256, 0.75, "floor", 64),  # MAE ViT-H/14
        (49, 0.6, "round", 20),  # SparK
        (49, 0.6, "floor", 19),  # FCMAE
        (45, 0.6, "ceil", 18),  # 27 exactly
        (100, 0.9, "floor", 10),  # floating point says 9.999999999999998
        (20, 0.55, "ceil", 9),  # floating point says 11.000000000000002 removed
    ],
)
def test_counts_are_the_papers(cells, ratio, rounding, kept):
    assert count_kept(cells, ratio, rounding, "test") == kept


@pytest.mark.parametrize("cells, ratio", [(1, 0.6), (49, 0.0), (49, 1.0), (10, 0.95)])
def test_masks_without_anything_to_predict_or_to_see_are_refused(cells, ratio):
    with pytest.raises(ValueError, match=r"removes (none|all)"):
        count_kept(cells, ratio, "ceil", "test")


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_outside_0_to_1_is_refused(ratio):
    with pytest.raises(ValueError, match="between 0 and 1"):
        count_kept(49, ratio, "ceil", "test")


@pytest.mark.parametrize(
    "img_size, stride, cell",
    [
        ((224, 224), 16, 32),
        ((224, 224), 32, 32),
        ((192, 192), 4, 32),
        ((192, 192), 16, 32),
        ((224, 224), 14, 28),
        ((384, 384), 16, 32),
        ((96, 96), 16, 16),
        ((96, 96), 32, 32),
        ((64, 64), 16, 16),
        ((32, 32), 4, 4),
        ((28, 28), 4, 4),
        ((28, 28), 2, 4),
        ((96, 64), 8, 8),
        ((64, 224), 16, 16),
    ],
)
def test_cells_suit_the_image_and_hold_whole_tokens(img_size, stride, cell):
    assert choose_cell(img_size, stride) == cell
    assert cell % stride == 0
    assert img_size[0] % cell == img_size[1] % cell == 0


def test_a_cell_that_cuts_tokens_is_refused():
    with pytest.raises(ValueError, match="24 is not a multiple of the 16 pixels"):
        check_cell(24, (224, 224), 16, "test")


def test_names_the_side_that_does_not_divide():
    with pytest.raises(ValueError, match=r"height 100 is not divisible by patch_size 16.*96 or 112"):
        cell_grid((100, 96), (16, 16), "test", "patch_size")
    with pytest.raises(ValueError, match=r"width 8 is not divisible by patch_size 16 .*; 16 would be"):
        cell_grid((96, 8), (16, 16), "test", "patch_size")


def test_masks_are_repeated_over_tokens_and_pixels():
    mask = torch.tensor([[True, False, False, False, False, True]])  # 2 x 3 cells
    tokens = removed_tokens(mask, (2, 3), (4, 6))
    assert tokens.shape == (1, 4, 6)
    assert tokens[0, :2, :2].all()
    assert tokens[0, 2:, 4:].all()
    assert tokens.sum() == 8
    pixels = removed_pixels(mask, (2, 3), (8, 12))
    assert pixels.shape == (1, 1, 8, 12)
    assert pixels.sum() == 32
