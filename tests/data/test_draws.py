import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmim.data.draws import (
    CROP_TRIES,
    Purpose,
    crop_box,
    draw_crop,
    draw_flip,
    draw_replacement,
    permutation,
    uniforms,
)

PAPER = ((0.2, 1.0), (3 / 4, 4 / 3))


def test_numbers_never_change_between_versions():
    """Runs are resumed with other versions of numpy: these values are for ever."""
    assert uniforms(0, Purpose.CROP, 0, 0, 3).tolist() == [0.8133540609793564, 0.7513314251083365, 0.6716490436969984]
    assert permutation(7, 3, 10).tolist() == [2, 8, 9, 4, 0, 6, 7, 5, 1, 3]
    assert draw_crop(1, 2, 3, (500, 375), *PAPER) == (30, 4, 354, 370)


def test_each_coordinate_of_the_key_matters():
    draws = [
        uniforms(seed, purpose, epoch, index, 4, view).tolist()
        for seed in (0, 1)
        for purpose in (Purpose.CROP, Purpose.FLIP)
        for epoch in (0, 1)
        for index in (0, 1)
        for view in (0, 1)
    ]
    assert len({tuple(draw) for draw in draws}) == 32


@pytest.mark.parametrize("seed", [-1, 0, 2**31, 2**63, 2**64 - 1])
def test_any_integer_is_a_seed(seed):
    numbers = uniforms(seed, Purpose.CROP, 0, 0, 100)
    assert 0 <= numbers.min() < numbers.max() < 1


@pytest.mark.parametrize("length", [1, 2, 17, 1000])
def test_an_epoch_visits_every_image_once_in_another_order(length):
    orders = [permutation(0, epoch, length) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(length))
    assert length < 10 or not np.array_equal(orders[0], orders[1])


def test_half_of_the_images_are_flipped():
    share = np.mean([draw_flip(0, epoch, index) for epoch in range(4) for index in range(1000)])
    assert abs(share - 0.5) < 0.03


def test_replacements_are_images_of_the_source():
    drawn = [draw_replacement(0, 0, 5, attempt, 7) for attempt in range(200)]
    assert set(drawn) == set(range(7))


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    ratio=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)).map(sorted),
    index=st.integers(0, 10**9),
)
def test_a_crop_lies_inside_any_image(width, height, scale, ratio, index):
    box = draw_crop(0, 0, index, (width, height), tuple(scale), tuple(ratio))
    assert box.width >= 1
    assert box.height >= 1
    assert 0 <= box.left <= width - box.width
    assert 0 <= box.top <= height - box.height


def law(rng, width, height, scale, ratio):
    """RandomResizedCrop written down once more, with another generator."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.integers(0, width - w, endpoint=True), rng.integers(0, height - h, endpoint=True), w, h
    return None


def test_crops_follow_the_usual_law():
    rng = np.random.default_rng(0)
    ours = np.array([draw_crop(0, 0, index, (500, 375), *PAPER) for index in range(4000)])
    theirs = np.array([law(rng, 500, 375, *PAPER) for _ in range(4000)])
    for column in range(4):
        spread = theirs[:, column].std()
        assert abs(ours[:, column].mean() - theirs[:, column].mean()) < 0.08 * spread
        assert abs(ours[:, column].std() / spread - 1) < 0.05


def test_an_image_in_which_no_crop_fits_gives_its_centre():
    never = [0.999] * (4 * CROP_TRIES)
    assert crop_box((1000, 10), (0.9, 1.0), (3 / 4, 4 / 3), never) == (493, 0, 13, 10)
    assert crop_box((10, 1000), (0.9, 1.0), (3 / 4, 4 / 3), never) == (0, 493, 10, 13)
    assert crop_box((1, 400), (0.2, 1.0), (3 / 4, 4 / 3), never) == (0, 199, 1, 1)


def test_the_whole_image_is_a_crop_too():
    assert crop_box((64, 64), (1.0, 1.0), (1.0, 1.0), [0.5] * 40) == (0, 0, 64, 64)
