"""A small folder of real photographs, without a download: `python -m fastmim.data.photos DIR`.

Cuts each of the 17 photographs that scikit-image and scikit-learn bring along, at no more than 512 pixels a side, into
4 x 4 regions, which share no pixel, and writes them to DIR/NAME/ROW_COLUMN.png: 272 images of 17 classes for
`--data.root DIR`. Files of these names are replaced.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from fastmim.data.errors import DataError

REGIONS = 4  # a side
SIDE = 512  # of a photograph, at most
_SCIKIT_IMAGE = (
    "astronaut", "brick", "camera", "cell", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
    "immunohistochemistry", "moon", "retina", "rocket",
)  # fmt: skip
_SCIKIT_LEARN = ("china", "flower")


def photographs() -> dict[str, Image.Image]:
    """Name -> photograph in colour, at most SIDE pixels high and wide, in a fixed order.

    Raises:
        DataError: a package that brings them is missing.
    """
    try:
        from skimage import data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise DataError(
            f"The photographs come with scikit-image and scikit-learn, of which {error.name} is not installed: "
            f"pip install scikit-image scikit-learn."
        ) from error
    pixels = {name: getattr(data, name)() for name in _SCIKIT_IMAGE}
    pixels["motorcycle"] = data.stereo_motorcycle()[0]
    pixels |= {name: load_sample_image(f"{name}.jpg") for name in _SCIKIT_LEARN}
    found = {name: Image.fromarray(pixels[name]).convert("RGB") for name in sorted(pixels)}
    for photograph in found.values():
        photograph.thumbnail((SIDE, SIDE))
    return found


def regions(photograph: Image.Image, side: int = REGIONS) -> list[Image.Image]:
    """side x side parts of it, row by row."""
    width, height = photograph.size
    edges = [
        (column * width // side, row * height // side, (column + 1) * width // side, (row + 1) * height // side)
        for row in range(side)
        for column in range(side)
    ]
    return [photograph.crop(box) for box in edges]


def write_photos(folder: Path) -> int:
    """How many images were written.

    Raises:
        DataError: see `photographs`; or a folder that cannot be written.
    """
    count = 0
    for name, photograph in photographs().items():
        try:
            (folder / name).mkdir(parents=True, exist_ok=True)
            for place, region in enumerate(regions(photograph)):
                region.save(folder / name / f"{place // REGIONS}_{place % REGIONS}.png")
                count += 1
        except OSError as error:
            raise DataError(f"{folder / name} cannot be written: {error.strerror or error}") from error
    return count


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastmim.data.photos", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", metavar="DIR", type=Path, help="where to write them; made if it does not exist")
    options = parser.parse_args(arguments)
    try:
        count = write_photos(options.folder)
    except DataError as error:
        print(error, file=sys.stderr)
        return error.code
    print(f"{count} images in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
