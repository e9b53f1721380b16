"""From a file to upright 8-bit pixels: the one way in which every kind of image is read.

Formats: JPEG, PNG, WebP, BMP, TIFF, by content; nothing else is opened, whatever the file is called. The size in the
header is checked against `max_pixels` before anything is decoded.

| stored as                      | becomes                                                                       |
|--------------------------------|-------------------------------------------------------------------------------|
| RGB, YCbCr, CMYK, HSV          | RGB by Pillow's own conversion (CMYK without colour profile)                  |
| grey, black and white          | grey, repeated three times when colour is wanted                              |
| colour where grey is wanted    | luma 0.299 R + 0.587 G + 0.114 B                                              |
| palette                        | its colours                                                                   |
| alpha, of any kind             | dropped: the stored colour stays, as in nearly every other loader             |
| 16 bits a channel              | the high byte                                                                 |
| 32-bit integer or float (TIFF) | stretched from the image's own minimum and maximum to 0..255 (none is agreed) |
| EXIF orientation               | applied                                                                       |
| several frames                 | the first                                                                     |
| anything else, e.g. CIE Lab    | unreadable                                                                    |

A truncated file is unreadable, not half an image (Pillow's `LOAD_TRUNCATED_IMAGES` must stay off). Unreadable files
raise; what exactly is up to Pillow's readers, so callers catch `Exception`.

JPEGs can be decoded at a half, a quarter or an eighth of their size, many times faster. `shrink_for` allows that only
while a crop keeps at least twice the size at which it will be used; the result then stays within a mean absolute
difference of 1.5 levels (of 255) of the full decode on photographs, tested.
"""

from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, TiffImagePlugin, WebPImagePlugin  # noqa: F401 (registers the formats)

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(file: BinaryIO, max_pixels: int) -> Image.Image:
    """The image in an open file, header read and size checked, pixels not decoded."""
    # Pillow's own limit warns above its number and raises above twice that: never below ours.
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    image = Image.open(file, formats=FORMATS)
    width, height = image.size
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels, more than data.max_pixels = {max_pixels:,}")
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        image.load()  # other formats may keep the orientation behind the pixels, or apply it while loading
    return image


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; damaged EXIF data counts as upright."""
    if "exif" not in image.info:
        return 1
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever is wrong there, the pixels are still good
        return 1
    return value if value in _UPRIGHT else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) as seen, whatever the orientation stored."""
    width, height = image.size
    return (height, width) if orientation(image) >= 5 else (width, height)


def shrink_for(box: tuple[float, float], size: tuple[int, int]) -> int:
    """The coarsest of 8, 4, 2, 1 at which `box` still has twice the pixels of `size` each way (both width, height)."""
    room = min(box[0] / size[0], box[1] / size[1])
    return next((shrink for shrink in (8, 4, 2) if room >= 2 * shrink), 1)


def decode(image: Image.Image, channels: int, shrink: int = 1) -> tuple[Image.Image, float]:
    """Upright 8-bit pixels, grey ("L") or colour ("RGB"), and by how much they are smaller than the stored image.

    Args:
        image: as `open_image` gives it.
        channels: 1 or 3.
        shrink: 1, 2, 4 or 8: how much smaller the image may be decoded. Only JPEGs are.
    """
    shrunk = 1.0
    if shrink > 1 and isinstance(image, JpegImagePlugin.JpegImageFile):
        width, height = image.size
        drafted = image.draft(None, (max(1, width // shrink), max(1, height // shrink)))
        shrunk = width / drafted[1][2] if drafted else 1.0
    turn = _UPRIGHT.get(orientation(image))
    image.load()
    if turn is not None:
        image = image.transpose(turn)
    return _in_channels(image, channels), shrunk


def _in_channels(image: Image.Image, channels: int) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif mode in ("I", "F"):
        image = _stretched(image)
    elif mode in ("RGBa", "La"):
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[mode])
    elif mode in ("P", "PA"):
        image = image.convert("RGBA")
    if channels == 3:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode in ("1", "L", "LA", "RGB"):
        return image if image.mode == "L" else image.convert("L")
    return image.convert("RGB").convert("L")


def _stretched(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("pixels that are not finite numbers")
    low, high = values.min(), values.max()
    levels = np.rint((values - low) * (255 / (high - low if high > low else 1.0)))
    return Image.fromarray(levels.astype(np.uint8))
