import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.engine.pictures import picture_grid, save_picture, to_pixels
from fastmim.methods import Pictures


def test_pixels_are_un_normalised_and_clamped():
    images = torch.tensor([0.0, 2.0, -2.0, 9.0, float("nan")]).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    pixels = to_pixels(images, mean=[0.5, 0.25, 0.5], std=[0.25, 0.25, 0.1])
    assert pixels.shape == (5, 2, 2, 3)
    assert pixels[:, 0, 0].tolist() == [[128, 64, 128], [255, 191, 178], [0, 0, 76], [255, 255, 255], [0, 0, 0]]


@pytest.mark.parametrize("channels", [1, 2, 3, 13])
def test_any_number_of_channels_becomes_a_picture(channels):
    images = torch.rand(2, channels, 4, 6)
    pixels = to_pixels(images, [0.0] * channels, [1.0] * channels)
    shown = images[:, :3] if channels >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    np.testing.assert_allclose(pixels / 255, shown.permute(0, 2, 3, 1), atol=0.5 / 255 + 1e-6)


def test_one_mean_serves_all_channels():
    assert to_pixels(torch.zeros(1, 3, 1, 1), [0.5], [0.2]).tolist() == [[[[128, 128, 128]]]]


def test_grid_has_a_row_an_image_and_small_images_are_enlarged(tmp_path):
    parts = [torch.full((20, 1, 32, 48), value) for value in (0.0, 0.5, 1.0)]
    grid = picture_grid(Pictures(*parts), [0.0], [1.0])
    assert grid.shape == (8 * 96 + 7 * 4, 3 * 144 + 2 * 4, 3)
    assert [int(grid[0, x, 0]) for x in (0, 144, 148, 296)] == [0, 255, 128, 255]
    save_picture(tmp_path / "p.png", grid)
    with Image.open(tmp_path / "p.png") as image:
        assert image.size == (grid.shape[1], grid.shape[0])
        np.testing.assert_array_equal(np.asarray(image), grid)
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]
