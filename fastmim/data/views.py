"""Several crops of one image in one batch: what each of them is."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastmim.data.errors import DataError


@dataclass(frozen=True)
class ViewSpec:
    """One crop of every image.

    name: what the batch calls it.
    size: (height, width) in pixels.
    scale: smallest and largest share of the image area that its box covers; None: as the data settings say.
    crop: None draws a box (and a flip) of its own; the name of an earlier view takes that one's.
    """

    name: str
    size: tuple[int, int]
    scale: tuple[float, float] | None = None
    crop: str | None = None


def check_views(views: Sequence[ViewSpec], img_size: tuple[int, int]) -> tuple[ViewSpec, ...]:
    """The views of a batch: those given, or the one that is `img_size` large.

    Raises:
        DataError: names given twice, a crop that no earlier view has, an impossible scale, or a first view (the
            batch's `images`) of another size than `img_size`.
    """
    if not views:
        return (ViewSpec("images", img_size),)
    known: set[str] = set()
    for view in views:
        if view.name in known:
            raise DataError(f"views: the name {view.name} is given twice.")
        if view.crop is not None and view.crop not in known:
            raise DataError(f"views: {view.name} shares the crop of {view.crop}, which is no earlier view.")
        if view.crop is not None and view.scale is not None:
            raise DataError(f"views: {view.name} shares the crop of {view.crop}, so it has no scale of its own.")
        if min(view.size) < 1:
            raise DataError(f"views: {view.name} has size {list(view.size)}; both sides must be positive.")
        if view.scale is not None and not 0 < view.scale[0] <= view.scale[1] <= 1:
            raise DataError(f"views: the scale of {view.name} must lie in (0, 1], smallest first; got {view.scale}.")
        known.add(view.name)
    if tuple(views[0].size) != tuple(img_size):
        raise DataError(
            f"views: the first, {views[0].name}, has size {list(views[0].size)}, but img_size is {list(img_size)}."
        )
    return tuple(views)
