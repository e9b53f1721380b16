import pytest
import torch
from torch.nn import functional as F

from fastmim.ops import visible_patch_embed
from fastmim.ops.visible_patch_embed import visible_patch_embed_ref

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make(batch, channels, grid, patch, kept, width, *, dtype=torch.float32, device="cpu"):
    """(images, ids_keep, weight, bias, positions)"""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    (gh, gw), (p, q) = grid, patch
    ids_keep = torch.rand(batch, gh * gw, generator=generator).argsort(1)[:, :kept].to(device)
    weight = normal(width, channels, p, q) * (channels * p * q) ** -0.5
    return normal(batch, channels, gh * p, gw * q), ids_keep, weight, normal(width), normal(gh * gw, width)


@pytest.mark.parametrize("kept", [1, 3, 6, None])
@pytest.mark.parametrize("patch", [(4, 4), (2, 5)])
def test_is_a_convolution_and_a_gather(patch, kept):
    images, ids_keep, weight, bias, positions = make(2, 3, (2, 3), patch, kept or 6, 7, dtype=torch.float64)
    mean, std = (torch.tensor(s, dtype=torch.float64).view(1, 3, 1, 1) for s in (MEAN, STD))
    embedded = F.conv2d((images - mean) / std, weight, bias, stride=patch).flatten(2).transpose(1, 2) + positions
    ids = None if kept is None else ids_keep
    expected = embedded if kept is None else embedded.gather(1, ids_keep.unsqueeze(-1).expand(-1, -1, 7))
    torch.testing.assert_close(visible_patch_embed(images, ids, weight, bias, positions, mean=MEAN, std=STD), expected)
    as_tensors = {"mean": torch.tensor(MEAN, dtype=torch.float64), "std": torch.tensor(STD, dtype=torch.float64)}
    torch.testing.assert_close(visible_patch_embed(images, ids, weight, bias, positions, **as_tensors), expected)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_bytes_are_scaled_to_one(layout):
    images, ids_keep, weight, *_ = make(2, 3, (2, 3), (4, 4), 2, 7, dtype=torch.float64)
    pixels = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    given = pixels if layout == "nchw" else pixels.permute(0, 2, 3, 1).contiguous()
    for options in ({}, {"mean": MEAN, "std": STD}):
        expected = visible_patch_embed(pixels.double() / 255, ids_keep, weight, None, **options)
        torch.testing.assert_close(
            visible_patch_embed(given, ids_keep, weight, None, layout=layout, **options), expected
        )


def test_gradients_of_the_reference():
    images, ids_keep, *parameters = make(2, 2, (2, 2), (1, 3), 2, 3, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (images, *parameters)]

    def function(images, weight, bias, positions):
        return visible_patch_embed_ref(images, ids_keep, weight, bias, positions, MEAN[:2], STD[:2])

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": torch.zeros(3, 8, 12)}, r"images must be \[B, C, H, W\], got \[3, 8, 12\]"),
        ({"images": torch.zeros(2, 3, 8, 13)}, "8x13 pixels does not divide into patches of 4x4"),
        ({"images": torch.zeros(2, 3, 8, 12, dtype=torch.int64)}, "uint8 or floating point, got torch.int64"),
        ({"layout": "nhwc"}, r"weight must be \[E, 12, p, q\], as nhwc images \[2, 3, 8, 12\] have 12 channels"),
        ({"layout": "hwc"}, "layout must be one of nchw, nhwc, got 'hwc'"),
        ({"weight": torch.zeros(7, 48)}, r"weight must be \[E, 3, p, q\].*got \[7, 48\]"),
        ({"ids_keep": torch.zeros(3, 2, dtype=torch.int64)}, r"must be int64 \[2, K\], got torch.int64 \[3, 2\]"),
        ({"ids_keep": torch.zeros(2, 2)}, r"ids_keep must be int64 \[2, K\], got torch.float32 \[2, 2\]"),
        ({"bias": torch.zeros(6)}, r"bias must be \[7\], as weight has rows, got \[6\]"),
        ({"positions": torch.zeros(7, 7)}, r"positions must be \[6, 7\] for 6 patches of 4x4 pixels, got \[7, 7\]"),
        ({"mean": MEAN}, "mean and std go together; std is missing"),
        ({"mean": MEAN, "std": STD[:2]}, "std must hold 3 numbers, one a channel, got 2"),
        ({"mean": torch.zeros(2), "std": STD}, r"mean must hold 3 numbers, one a channel, got \[2\]"),
        ({"weight": torch.zeros(7, 3, 4, 4, device="meta")}, "weight is on meta, images on cpu"),
        ({"bias": torch.zeros(7, dtype=torch.int64)}, "bias must be floating point, got torch.int64"),
    ],
)  # fmt: skip
def test_names_what_does_not_fit(change, message):
    images, ids_keep, weight, bias, positions = make(2, 3, (2, 3), (4, 4), 2, 7)
    arguments = {
        "images": images, "ids_keep": ids_keep, "weight": weight, "bias": bias, "positions": positions
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        visible_patch_embed(**arguments)
