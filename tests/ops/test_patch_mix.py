import pytest
import torch
from torch.nn import functional as F

from fastmim.ops import mixing_map, patch_mix, visible_patch_embed
from fastmim.ops.patch_mix import patch_mix_ref
from tests.ops.support import LAYOUTS, assert_as_good_as_torch, backends_of, poisoned_memory

BACKENDS = backends_of("patch_mix")
QUICK = backends_of("patch_mix", isas=("avx512",))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# S, G, C, (gh, gw), (p, q), E
CASES = [(2, 4, 3, (3, 3), (4, 4), 8), (1, 3, 13, (2, 3), (5, 2), 7), (3, 2, 1, (2, 1), (3, 3), 4)]


def make(case, dtype=torch.float32, device="cpu"):
    """(images, segments, weight, bias, positions)"""
    groups, size, channels, (gh, gw), (p, q), width = case
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    segments = mixing_map(groups, size, gh * gw, torch.tensor([1, 2, 0])).segments.to(device)
    weight = normal(width, channels, p, q) * (channels * p * q) ** -0.5
    return normal(groups * size, channels, gh * p, gw * q), segments, weight, normal(width), normal(gh * gw, width)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_is_a_convolution_of_mixed_images(case, full):
    """As CutMix would: cut images are pasted first, position by position."""
    images, segments, weight, bias, positions = make(case, torch.float64)
    groups, size, channels, (gh, gw), (p, q), _ = case
    if channels == 3:
        scale = {"mean": MEAN, "std": STD}
        mean, std = (torch.tensor(s, dtype=torch.float64).view(1, 3, 1, 1) for s in (MEAN, STD))
    else:
        scale, (mean, std) = {}, (0, 1)
    mixed = []
    for group in range(groups):
        for shift in range(size if full else 1):
            canvas = torch.empty_like(images[0])
            for place in range(gh * gw):
                y, x = place // gw * p, place % gw * q
                source = group * size + (int(segments[group, place]) + shift) % size
                canvas[:, y : y + p, x : x + q] = images[source, :, y : y + p, x : x + q]
            mixed.append(canvas)
    embedded = F.conv2d((torch.stack(mixed) - mean) / std, weight, bias, stride=(p, q)).flatten(2).transpose(1, 2)
    out = patch_mix(images, segments, weight, bias, positions, full=full, **scale)
    torch.testing.assert_close(out, embedded + positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend, case, full, layout, dtype):
    images, segments, weight, bias, positions = make(case, dtype)
    assert_as_good_as_torch(
        patch_mix, patch_mix_ref, layout(images), segments, weight, bias, positions,
        backend=backend, wrt=(0, 2, 3, 4), full=full,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_are_normalised_on_the_way(backend, layout):
    images, segments, weight, bias, positions = make(CASES[0], device=backend.device)
    pixels = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    given = (pixels if layout == "nchw" else pixels.permute(0, 2, 3, 1).contiguous()).to(backend.device)
    options = {"mean": MEAN, "std": STD, "backend": backend}
    expected = patch_mix(pixels.to(backend.device) / 255, segments, weight, bias, positions, **options)
    with poisoned_memory():
        out = patch_mix(given, segments, weight, bias, positions, layout=layout, **options)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_of_identical_images_is_not_changed_by_mixing(backend):
    images, segments, weight, bias, positions = make(CASES[0], device=backend.device)
    images = images[::4].repeat_interleave(4, 0)
    out = patch_mix(images, segments, weight, bias, positions, backend=backend)
    expected = visible_patch_embed(images[::4], None, weight, bias, positions, backend="reference")
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_mixing_shows_every_patch_once(backend):
    images, segments, weight, bias, _ = make(CASES[1], device=backend.device)
    out = patch_mix(images, segments, weight, bias, full=True, backend=backend)
    plain = visible_patch_embed(images, None, weight, bias, backend="reference")
    torch.testing.assert_close(out.sum(0), plain.sum(0))
    first = patch_mix(images, segments, weight, bias, backend=backend)
    torch.testing.assert_close(out[:1], first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_and_weights_get_the_same_gradient_twice(backend):
    images, segments, *parameters = make(CASES[0], device=backend.device)
    for p in parameters:
        p.requires_grad_()
    results = []
    for _ in range(2):
        out = patch_mix(images, segments, *parameters, full=True, backend=backend)
        results.append(torch.autograd.grad(out.square().sum(), parameters))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", QUICK)
def test_follows_autocast(backend):
    images, segments, weight, bias, positions = make(CASES[0], device=backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        out = patch_mix(images, segments, weight, bias, backend=backend)
        wide = patch_mix(images, segments, weight, bias, positions, backend=backend)
    assert (out.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.float(), patch_mix_ref(images, segments, weight, bias), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("backend", QUICK)
def test_compiles_without_graph_breaks(backend):
    images, segments, weight, bias, positions = make(CASES[0], device=backend.device)
    weight.requires_grad_()
    plain = backend.plain

    def function(w):
        return patch_mix(images, segments, w, bias, positions, mean=MEAN, std=STD, backend=plain).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [(f(weight), *torch.autograd.grad(f(weight), weight)) for f in (compiled, function)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": torch.zeros(3, 12, 12)}, r"images must be \[B, C, H, W\], got \[3, 12, 12\]"),
        ({"images": torch.zeros(8, 3, 12, 13)}, "12x13 pixels does not divide into patches of 4x4"),
        ({"images": torch.zeros(7, 3, 12, 12)}, "7 images do not divide among the 2 mixing maps"),
        ({"segments": torch.zeros(0, 9, dtype=torch.int64)}, "8 images and no mixing map"),
        ({"segments": torch.zeros(2, 8, dtype=torch.int64)}, r"int64 \[B / G, 9\] for 9 patches.*\[2, 8\]"),
        ({"segments": torch.zeros(2, 9)}, "got torch.float32"),
        ({"weight": torch.zeros(7, 48)}, r"weight must be \[E, 3, p, q\]"),
        ({"positions": torch.zeros(8, 8)}, r"positions must be \[9, 8\]"),
        ({"mean": MEAN}, "std is missing"),
        ({"layout": "hwc"}, "layout must be one of nchw, nhwc, got 'hwc'"),
    ],
)
def test_names_what_does_not_fit(change, message):
    names = ("images", "segments", "weight", "bias", "positions")
    with pytest.raises(ValueError, match=f"patch_mix: .*{message}"):
        patch_mix(**dict(zip(names, make(CASES[0]), strict=True)) | change)
