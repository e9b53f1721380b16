import io

import numpy as np
import pytest
from PIL import Image, ImageFile

from fastmim.data.decode import decode, open_image, orientation, shrink_for, upright_size

CAP = 10_000_000


def stored(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(contents, channels=3, shrink=1):
    return decode(open_image(io.BytesIO(contents), CAP), channels, shrink)[0]


def pixels(image):
    return np.asarray(image, dtype=np.int64)


def distance(a, b):
    return np.abs(pixels(a) - pixels(b)).mean()


@pytest.fixture(scope="module")
def photograph(photographs):
    return photographs["coffee"].resize((80, 60))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_every_pixel(photograph, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    image = read(stored(photograph, kind, **options))
    assert image.mode == "RGB"
    assert distance(image, photograph) == 0


def test_grey_is_repeated_for_colour(photograph):
    grey = photograph.convert("L")
    image = pixels(read(stored(grey, "PNG")))
    assert image.shape == (60, 80, 3)
    assert (image == pixels(grey)[:, :, None]).all()


def test_colour_becomes_luma_for_grey(photograph):
    image = read(stored(photograph, "PNG"), channels=1)
    assert image.mode == "L"
    luma = pixels(photograph) @ np.array([0.299, 0.587, 0.114])
    assert np.abs(pixels(image) - luma).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_black_and_white(photograph, channels):
    image = read(stored(photograph.convert("1"), "PNG"), channels)
    assert set(np.unique(pixels(image))) == {0, 255}


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(photograph, kind):
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    contents = stored(photograph.convert("CMYK"), kind, **options)
    assert open_image(io.BytesIO(contents), CAP).mode == "CMYK"
    assert distance(read(contents), photograph) < 4
    assert read(contents, channels=1).mode == "L"


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_keep_the_high_byte(photograph, kind, channels):
    values = pixels(photograph.convert("L")) * 256 + 77
    image = read(stored(Image.fromarray(values.astype(np.uint16)), kind), channels)
    assert distance(image.convert("L"), photograph.convert("L")) == 0


def test_big_endian_sixteen_bits(photograph):
    grey = photograph.convert("L")
    swapped = Image.frombytes("I;16B", grey.size, (pixels(grey) * 256 + 9).astype(">u2").tobytes())
    assert distance(read(stored(swapped, "TIFF"), channels=1), grey) == 0


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_range_are_stretched(photograph, dtype):
    values = pixels(photograph.convert("L")).astype(dtype)
    values[0, 0], values[0, 1] = 0, 255
    image = read(stored(Image.fromarray(values * 300 - 7000), "TIFF"), channels=1)
    assert np.abs(pixels(image) - values).max() <= 1
    constant = read(stored(Image.fromarray(np.full((4, 4), 5, dtype)), "TIFF"))
    assert pixels(constant).max() == 0


def test_pixels_that_are_no_numbers_are_unreadable():
    values = np.full((4, 4), np.nan, np.float32)
    with pytest.raises(ValueError, match="finite"):
        read(stored(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_alpha_is_dropped_and_the_colour_stays(photograph, kind, channels):
    with_alpha = photograph.copy()
    with_alpha.putalpha(Image.fromarray(np.full((60, 80), 3, np.uint8)))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    image = read(stored(with_alpha, kind, **options), channels)
    assert distance(image, photograph if channels == 3 else photograph.convert("L")) == 0


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_with_alpha(photograph, channels):
    grey = photograph.convert("L")
    with_alpha = grey.copy()
    with_alpha.putalpha(0)
    assert with_alpha.mode == "LA"
    image = read(stored(with_alpha, "PNG"), channels)
    assert distance(image.convert("L"), grey) == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))])
@pytest.mark.parametrize("channels", [1, 3])
def test_palettes_with_and_without_transparency(photograph, transparency, channels):
    palette = photograph.quantize(256)
    options = {} if transparency is None else {"transparency": transparency}
    image = read(stored(palette, "PNG", **options), channels)
    expected = palette.convert("RGB")
    assert distance(image, expected if channels == 3 else expected.convert("L")) == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied(photograph, kind, turn):
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[turn]  # Pillow's Transpose that undoes it
    turned = photograph if back is None else photograph.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    contents = stored(turned, kind, exif=exif, **options)
    opened = open_image(io.BytesIO(contents), CAP)
    assert upright_size(opened) == (80, 60)
    image = decode(opened, 3)[0]
    assert image.size == (80, 60)
    assert distance(image, photograph) < 3


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(40)])
def test_damaged_exif_counts_as_upright(photograph, exif):
    opened = open_image(io.BytesIO(stored(photograph, "JPEG", exif=exif)), CAP)
    assert orientation(opened) == 1
    assert decode(opened, 3)[0].size == (80, 60)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_several(photograph, kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    others = [Image.new("RGB", photograph.size, colour) for colour in ("red", "blue")]
    image = read(stored(photograph, kind, save_all=True, append_images=others, **options))
    assert distance(image, photograph) == 0


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1)])
def test_images_one_pixel_wide(size):
    assert read(stored(Image.new("RGB", size, "red"), "PNG")).size == size


def test_damaged_files_are_refused(damaged):
    for name, contents in damaged.items():
        with pytest.raises(Exception) as failure:  # noqa: PT012 (readers raise what they like)
            read(contents)
            pytest.fail(f"{name} was read")
        assert not isinstance(failure.value, MemoryError)


def test_a_bomb_is_refused_by_its_header(damaged, monkeypatch):
    """The cap is ours, and nothing is decoded before it speaks."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"12000 x 12000 pixels, more than data\.max_pixels"):
        open_image(io.BytesIO(damaged["quiet_bomb.png"]), 100_000_000)


def test_a_larger_cap_is_ours_to_give(damaged, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: None)
    assert open_image(io.BytesIO(damaged["bomb.png"]), 500_000_000).size == (20_000, 20_000)


def test_shrinking_keeps_twice_the_size_in_use():
    assert shrink_for((447, 447), (112, 112)) == 1
    assert shrink_for((448, 448), (112, 112)) == 2
    assert shrink_for((448, 447), (112, 112)) == 1
    assert shrink_for((4000, 3000), (112, 112)) == 8


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_a_shrunk_jpeg_stays_within_the_stated_tolerance(photographs, quality):
    worst = 0.0
    for photograph in photographs.values():
        contents = stored(photograph, "JPEG", quality=quality)
        side = min(photograph.size)
        for shrink in (2, 4, 8):
            out = side // (2 * shrink)
            side_used = 2 * shrink * out  # the smallest crop for which `shrink_for` allows this
            assert shrink_for((side_used, side_used), (out, out)) == shrink
            left, top = (photograph.width - side_used) // 2, (photograph.height - side_used) // 3
            box = (left, top, left + side_used, top + side_used)
            full = read(contents)
            image, shrunk = decode(open_image(io.BytesIO(contents), CAP), 3, shrink)
            assert shrunk == shrink
            expected = full.resize((out, out), Image.Resampling.BICUBIC, box=box)
            got = image.resize((out, out), Image.Resampling.BICUBIC, box=tuple(edge / shrunk for edge in box))
            worst = max(worst, distance(got, expected))
    assert worst < 1.5


def test_only_jpegs_shrink(photograph):
    image, shrunk = decode(open_image(io.BytesIO(stored(photograph, "PNG")), CAP), 3, 4)
    assert shrunk == 1
    assert image.size == photograph.size
