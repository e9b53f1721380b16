"""Every random choice about an image, as a pure function of (seed, epoch, index).

Numbers come from Philox, a counter-based generator: the seed is its key, (purpose, view, epoch, index) its counter. So
nothing has to be remembered to resume, nothing depends on which process asks or in what order, and another pipeline
(one that decodes elsewhere) gets the same crops. Only Philox's raw bits are used, because numpy promises that these
stay the same from version to version, which it does not for `permutation` or `integers`.

`epoch` counts passes over the source, `index` is the image's place in the source, `view` tells several crops of one
image apart.
"""

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CROP_TRIES = 10


class Purpose(IntEnum):
    """What a number is drawn for: different purposes never share numbers."""

    ORDER = 0
    CROP = 1
    FLIP = 2
    REPLACEMENT = 3
    SPLIT = 4


class Box(NamedTuple):
    """A crop, in pixels of the upright image."""

    left: int
    top: int
    width: int
    height: int


def _raw(seed: int, purpose: Purpose, view: int, epoch: int, index: int, count: int) -> NDArray[np.uint64]:
    key = np.array([seed & (2**64 - 1), purpose], dtype=np.uint64)
    # The first word counts blocks of four numbers inside one draw.
    counter = np.array([0, view, epoch, index], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def uniforms(seed: int, purpose: Purpose, epoch: int, index: int, count: int, view: int = 0) -> NDArray[np.float64]:
    """[count] float64 in [0, 1)."""
    top53 = _raw(seed, purpose, view, epoch, index, count) >> np.uint64(11)
    return top53.astype(np.float64) * 2.0**-53


def permutation(seed: int, epoch: int, length: int, purpose: Purpose = Purpose.ORDER) -> NDArray[np.int64]:
    """[length] int64: the order in which pass `epoch` visits the source."""
    return np.argsort(_raw(seed, purpose, 0, epoch, 0, length), kind="stable")


def draw_replacement(seed: int, epoch: int, index: int, attempt: int, length: int) -> int:
    """The image, in [0, length), to try in the place of an unreadable one; `attempt` counts from 0."""
    return int(uniforms(seed, Purpose.REPLACEMENT, epoch, index, 1, view=attempt)[0] * length)


def draw_flip(seed: int, epoch: int, index: int, view: int = 0) -> bool:
    """Whether the image is mirrored: true for half of them."""
    return bool(uniforms(seed, Purpose.FLIP, epoch, index, 1, view)[0] < 0.5)


def draw_crop(
    seed: int,
    epoch: int,
    index: int,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    view: int = 0,
) -> Box:
    """The random crop of an image of `size` (width, height), by `crop_box`."""
    numbers = uniforms(seed, Purpose.CROP, epoch, index, 4 * CROP_TRIES, view)
    return crop_box(size, scale, ratio, numbers.tolist())


def crop_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], numbers: Sequence[float]
) -> Box:
    """RandomResizedCrop's law, from given numbers.

    The area is uniform in `scale` (shares of the image), the aspect ratio (width / height) log-uniform in `ratio`, the
    place uniform; ten tries are made for a box that fits, then the largest centred box of an allowed ratio is taken.

    Args:
        size: (width, height) in pixels.
        numbers: 4 * CROP_TRIES numbers in [0, 1): area, ratio, top, left of each try.

    Source: Inception's crop (arXiv 1409.4842, section 6) as torchvision's RandomResizedCrop made it common.
    """
    width, height = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for at in range(0, 4 * CROP_TRIES, 4):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * numbers[at])
        aspect = math.exp(low + (high - low) * numbers[at + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(numbers[at + 3] * (width - w + 1)), int(numbers[at + 2] * (height - h + 1)), w, h)
    w, h = width, height
    if width < height * ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width > height * ratio[1]:
        w = max(1, round(height * ratio[1]))
    return Box((width - w) // 2, (height - h) // 2, min(w, width), min(h, height))
