"""From an image of a source to the [C, H, W] bytes of one row of a batch.

Legend: C channels, H W size of the output. Where a row holds several views, it is flat: one view after the other.

A row is made in whatever process is asked; it depends on nothing but (seed, epoch, index) and the files.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastmim.data.config import DataConfig
from fastmim.data.decode import decode, shrink_for, upright_size
from fastmim.data.draws import Box, draw_crop, draw_flip, draw_replacement
from fastmim.data.sources import Source
from fastmim.data.views import ViewSpec, check_views

MOST_IN_A_ROW = 100

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Made(NamedTuple):
    """What became of one row."""

    image: int  # the index of the image in it; -1: none could be read
    bad: tuple[tuple[int, str], ...]  # unreadable images met on the way: (index, reason)


class MakeRow(Protocol):
    """Writes image `index` as pass `epoch` shows it into `out`, [C, H, W] uint8, or flat for several views."""

    def __call__(self, out: NDArray[np.uint8], epoch: int, index: int) -> Made: ...


class _Resizing:
    def __init__(self, source: Source, cfg: DataConfig, img_size: tuple[int, int]) -> None:
        self.source = source
        self.size = (img_size[1], img_size[0])  # Pillow's order
        self.filter = _FILTERS[cfg.interpolation]

    def cropped(
        self, index: int, box_for: Callable[[tuple[int, int]], tuple[float, float, float, float]]
    ) -> NDArray[np.uint8]:
        """[H, W] or [H, W, 3]: the part of image `index` that `box_for` chooses from its size, resized.

        Both sides are (width, height); a box is left, top, width, height.
        """
        image = self.source.open(index)
        box = box_for(upright_size(image))
        pixels, shrunk = decode(image, self.source.in_chans, shrink_for(box[2:], self.size))
        return self.resized(pixels, shrunk, box, self.size)

    def resized(
        self,
        pixels: Image.Image,
        shrunk: float,
        box: tuple[float, float, float, float],
        size: tuple[int, int],
    ) -> NDArray[np.uint8]:
        left, top, width, height = (side / shrunk for side in box)
        # Rounding may put the far edges past the image by an ulp, which Pillow refuses.
        edges = (left, top, min(left + width, pixels.width), min(top + height, pixels.height))
        return np.asarray(pixels.resize(size, self.filter, box=edges))


class TrainRow(_Resizing):
    """Random crop, resize with antialias, flip. An unreadable image is replaced by others that are drawn for it."""

    def __init__(
        self,
        source: Source,
        cfg: DataConfig,
        img_size: tuple[int, int],
        seed: int,
        views: Sequence[ViewSpec] = (),
    ) -> None:
        super().__init__(source, cfg, img_size)
        self.views = check_views(views, img_size)
        self.seed = seed
        self.scale, self.ratio, self.flip = source.scale, cfg.ratio, source.flip

    def __call__(self, out: NDArray[np.uint8], epoch: int, index: int) -> Made:
        bad: list[tuple[int, str]] = []
        chosen = index
        for attempt in range(MOST_IN_A_ROW):
            try:
                crops = self.crops(chosen, epoch, index)
            except Exception as error:  # readers of damaged files raise anything
                bad.append((chosen, f"{type(error).__name__}: {error}"))
                chosen = draw_replacement(self.seed, epoch, index, attempt, len(self.source))
                continue
            start = 0
            for view, pixels in zip(self.views, crops, strict=True):
                shape = (self.source.in_chans, *view.size)
                count = shape[0] * shape[1] * shape[2]
                _store(out if out.ndim == 3 else out[start : start + count].reshape(shape), pixels)
                start += count
            return Made(chosen, tuple(bad))
        return Made(-1, tuple(bad))

    def crops(self, chosen: int, epoch: int, index: int) -> list[NDArray[np.uint8]]:
        """Image `chosen`, decoded once, as the views of what was to be image `index`."""
        image = self.source.open(chosen)
        drawn = self.draw(upright_size(image), epoch, index)
        sizes = [(view.size[1], view.size[0]) for view in self.views]
        shrink = min(shrink_for(box[2:], size) for (box, _), size in zip(drawn, sizes, strict=True))
        pixels, shrunk = decode(image, self.source.in_chans, shrink)
        crops = (
            self.resized(pixels, shrunk, box, size)[:, :: -1 if flip else 1]
            for (box, flip), size in zip(drawn, sizes, strict=True)
        )
        return list(crops)

    def draw(self, size: tuple[int, int], epoch: int, index: int) -> list[tuple[Box, bool]]:
        """Box and flip of every view of an image of `size` (width, height)."""
        drawn: dict[str, tuple[Box, bool]] = {}
        for number, view in enumerate(self.views):
            if view.crop is not None:
                drawn[view.name] = drawn[view.crop]
                continue
            scale = self.scale if view.scale is None else view.scale
            box = draw_crop(self.seed, epoch, index, size, scale, self.ratio, number)
            drawn[view.name] = box, self.flip and draw_flip(self.seed, epoch, index, number)
        return list(drawn.values())


class EvalRow(_Resizing):
    """The centre of the image: `eval_share` of its shorter side at the output's aspect ratio. Nothing is drawn."""

    def __call__(self, out: NDArray[np.uint8], epoch: int, index: int) -> Made:
        def box_for(size: tuple[int, int]) -> tuple[float, float, float, float]:
            per_pixel = self.source.eval_share * min(size[0] / self.size[0], size[1] / self.size[1])
            width, height = self.size[0] * per_pixel, self.size[1] * per_pixel
            return (size[0] - width) / 2, (size[1] - height) / 2, width, height

        try:
            _store(out, self.cropped(index, box_for))
        except Exception as error:
            return Made(-1, ((index, f"{type(error).__name__}: {error}"),))
        return Made(index, ())


def _store(out: NDArray[np.uint8], pixels: NDArray[np.uint8]) -> None:
    out[...] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
