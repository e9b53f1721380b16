import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.data import DataConfig, create_source, normalise
from fastmim.data.draws import draw_crop, draw_flip
from fastmim.data.pipeline import EvalRow, TrainRow


def row(make, channels, size, epoch, index):
    out = np.full((channels, *size), 77, np.uint8)
    made = make(out, epoch, index)
    assert made == (index, ())
    return out


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(64, 64), (48, 96), (224, 160)])
def test_a_row_is_crop_then_antialiased_resize_then_flip(jpeg_folder, interpolation, size):
    cfg = DataConfig(root=jpeg_folder, interpolation=interpolation)
    source = create_source(cfg)
    make = TrainRow(source, cfg, size, seed=3)
    for index in range(6):
        image = source.load(index)
        box = draw_crop(3, 1, index, image.size, (0.2, 1.0), cfg.ratio)
        crop = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        expected = crop.resize((size[1], size[0]), getattr(Image.Resampling, interpolation.upper()))
        if draw_flip(3, 1, index):
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        got = row(make, 3, size, 1, index).transpose(1, 2, 0).astype(int)
        # The resize may look past the edge of the crop, which cropping first forbids: the border differs a little.
        inner = np.s_[4:-4, 4:-4]
        assert np.abs(got[inner] - np.asarray(expected, dtype=int)[inner]).mean() < 1.0


def test_rows_depend_on_seed_epoch_and_index_only(jpeg_folder):
    cfg = DataConfig(root=jpeg_folder)
    source = create_source(cfg)
    first = row(TrainRow(source, cfg, (32, 32), seed=0), 3, (32, 32), 0, 5)
    for seed, epoch, index, same in ((0, 0, 5, True), (1, 0, 5, False), (0, 1, 5, False), (0, 0, 6, False)):
        again = row(TrainRow(source, cfg, (32, 32), seed), 3, (32, 32), epoch, index)
        assert np.array_equal(first, again) is same


def test_flip_off_means_off(jpeg_folder):
    settings = {"root": jpeg_folder, "scale": (1.0, 1.0), "ratio": (0.1, 10.0)}
    mirrored, plain = (DataConfig(**settings, flip=flip) for flip in (True, False))
    source, source_plain = create_source(mirrored), create_source(plain)
    flipped = next(index for index in range(24) if draw_flip(0, 0, index))
    a = row(TrainRow(source, mirrored, (32, 32), 0), 3, (32, 32), 0, flipped)
    b = row(TrainRow(source_plain, plain, (32, 32), 0), 3, (32, 32), 0, flipped)
    assert np.array_equal(a[:, :, ::-1], b)


def test_a_large_jpeg_is_cropped_where_it_should_be(photographs, tmp_path):
    """Decoded at a fraction of its size, the crop must still be the same part of the image."""
    photograph = photographs["china"].resize((1281, 855), Image.Resampling.BICUBIC)
    for name, options in (("a.jpg", {"quality": 95}), ("b.png", {})):
        photograph.save(tmp_path / name, **options)
    cfg = DataConfig(root=tmp_path, scale=(0.3, 1.0), flip=False)
    source = create_source(cfg)
    make = TrainRow(source, cfg, (64, 64), seed=0)
    for epoch in range(8):
        jpeg = row(make, 3, (64, 64), epoch, 0).astype(int)
        box = draw_crop(0, epoch, 0, (1281, 855), cfg.scale, cfg.ratio)
        edges = (box.left, box.top, box.left + box.width, box.top + box.height)
        expected = np.asarray(source.load(1).resize((64, 64), Image.Resampling.BICUBIC, box=edges), dtype=int)
        assert np.abs(jpeg - expected.transpose(2, 0, 1)).mean() < 2.0


@pytest.mark.parametrize("size", [(1, 200), (200, 1), (1, 1), (3, 2)])
def test_images_of_a_few_pixels(tmp_path, size):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "1.png")
    cfg = DataConfig(root=tmp_path)
    source = create_source(cfg)
    for make in (TrainRow(source, cfg, (32, 32), 0), EvalRow(source, cfg, (32, 32))):
        out = row(make, 3, (32, 32), 0, 0)
        assert (out.reshape(3, -1).T == (10, 200, 30)).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_digits_are_enlarged(channels):
    cfg = DataConfig(in_chans=channels)
    source = create_source(cfg)
    out = row(EvalRow(source, cfg, (32, 32)), channels, (32, 32), 0, 0)
    expected = np.asarray(source.load(0).convert("L").resize((32, 32), Image.Resampling.BICUBIC))
    assert (out == expected).all()


@pytest.mark.parametrize("size", [(112, 112), (56, 112)])
def test_evaluation_sees_the_centre(tmp_path, size):
    """On a ramp the value of a pixel tells which place of the image it shows."""
    x, y = np.meshgrid((np.arange(600) + 0.5) * 255 / 600, (np.arange(400) + 0.5) * 255 / 400)
    Image.fromarray(np.stack([x, y, y], axis=-1).round().astype(np.uint8)).save(tmp_path / "1.png")
    cfg = DataConfig(root=tmp_path)
    out = row(EvalRow(create_source(cfg), cfg, size), 3, size, 0, 0)
    factor = max(size[0] / 400, size[1] / 600) * 256 / 224
    columns = 300 + (np.arange(size[1]) + 0.5 - size[1] / 2) / factor
    rows = 200 + (np.arange(size[0]) + 0.5 - size[0] / 2) / factor
    assert np.abs(out[0] - columns[None, :] * 255 / 600).max() < 1.5
    assert np.abs(out[1] - rows[:, None] * 255 / 400).max() < 1.5


def test_normalise_is_the_formula():
    images = torch.arange(2 * 3 * 16 * 16, dtype=torch.int64).remainder(256).to(torch.uint8).view(2, 3, 16, 16)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    exact = (images.double() / 255 - torch.tensor(mean).double().view(-1, 1, 1)) / torch.tensor(std).double().view(
        -1, 1, 1
    )
    got = normalise(images, mean, std)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(got, normalise(images, torch.tensor(mean), torch.tensor(std)))


def test_normalise_names_what_does_not_fit():
    with pytest.raises(ValueError, match="3 channels, but mean has 1 numbers"):
        normalise(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), (0.5,), (0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="uint8"):
        normalise(torch.zeros(1, 3, 2, 2), (0.5,) * 3, (0.5,) * 3)
