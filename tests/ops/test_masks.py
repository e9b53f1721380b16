import pytest
import torch

from fastmim.ops import patchify, unpatchify, upsample_mask
from fastmim.ops.masks import patch_pair

SHAPES = [((2, 3, 32, 48), (16, 16)), ((1, 13, 6, 35), (3, 7)), ((3, 1, 5, 4), (1, 1)), ((0, 3, 8, 8), (4, 4))]


@pytest.mark.parametrize("shape, patch", SHAPES)
def test_unpatchify_is_the_inverse_of_patchify(shape, patch):
    images = torch.randn(shape)
    rows = patchify(images, patch)
    assert rows.shape == (shape[0], (shape[2] // patch[0]) * (shape[3] // patch[1]), patch[0] * patch[1] * shape[1])
    assert torch.equal(unpatchify(rows, patch, shape[2:], shape[1]), images)


def test_patches_are_row_major_and_channel_last():
    images = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    rows = patchify(images, (2, 3))
    for n, (y, x) in enumerate([(0, 0), (0, 3), (2, 0), (2, 3)]):
        expected = [images[0, c, y + p, x + q].item() for p in range(2) for q in range(3) for c in range(2)]
        assert rows[0, n].tolist() == expected


def test_patchify_takes_any_strides():
    images = torch.randn(2, 3, 16, 24)
    strided = torch.zeros(4, 5, 17, 26)[1:3, 1:4, 1:, 2:].copy_(images)
    assert torch.equal(patchify(strided, 8), patchify(images, 8))
    assert torch.equal(patchify(images.contiguous(memory_format=torch.channels_last), 8), patchify(images, 8))


@pytest.mark.parametrize("grid, size", [((2, 3), (8, 12)), ((7, 7), (14, 14)), ((1, 4), (1, 4)), ((2, 2), (6, 10))])
def test_a_pixel_has_the_mask_of_its_cell(grid, size):
    mask = torch.rand(3, grid[0] * grid[1]) < 0.5
    pixels = upsample_mask(mask, grid, size)
    assert pixels.shape == (3, *size)
    for y in range(size[0]):
        for x in range(size[1]):
            cell = (y * grid[0] // size[0]) * grid[1] + x * grid[1] // size[1]
            assert torch.equal(pixels[:, y, x], mask[:, cell])


def test_the_same_cells_as_patchify():
    """Patch n of an image lies under cell n of the mask."""
    mask = torch.rand(2, 6) < 0.5
    pixels = upsample_mask(mask, (2, 3), (16, 24)).unsqueeze(1)
    assert torch.equal(patchify(pixels, 8), mask.unsqueeze(-1).expand(-1, -1, 64))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: patchify(torch.zeros(1, 3, 30, 32), 16), r"divisible by the 16 x 16 patch, got \[1, 3, 30, 32\]"),
        (lambda: patchify(torch.zeros(3, 32, 32), 16), r"\[3, 32, 32\]"),
        (lambda: unpatchify(torch.zeros(1, 4, 100), 16, (32, 32), 3), r"\[B, 4, 768\], got \[1, 4, 100\]"),
        (lambda: unpatchify(torch.zeros(1, 4, 768), 16, (40, 32), 3), "40 x 32 images of 16 x 16 patches"),
        (lambda: upsample_mask(torch.zeros(1, 5).bool(), (2, 2), (8, 8)), r"2 x 2 grid has 4 cells, mask is \[1, 5\]"),
        (lambda: upsample_mask(torch.zeros(1, 4).bool(), (2, 2), (9, 8)), "9 x 8 is not a multiple of the 2 x 2 grid"),
        (lambda: patch_pair((16, 0)), "16 x 0"),
    ],
)
def test_names_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
