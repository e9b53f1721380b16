import pytest
import torch
from torch.nn import functional as F

from fastmim.ops import visible_patch_embed
from fastmim.ops.visible_patch_embed import visible_patch_embed_ref
from tests.ops.support import LAYOUTS, assert_as_good_as_torch, backends_of, poisoned_memory

BACKENDS = backends_of("visible_patch_embed")
KERNELS = backends_of("visible_patch_embed", reference=False)
QUICK = backends_of("visible_patch_embed", reference=False, isas=("avx512",))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# B, C, grid, patch, K (None: all), E, bias, positions, normalised
CASES = [
    (2, 3, (2, 3), (16, 16), 2, 24, True, True, True),
    (3, 1, (3, 2), (7, 5), 1, 13, False, True, False),
    (2, 13, (2, 2), (4, 10), 4, 8, True, False, True),
    (1, 3, (1, 5), (1, 1), 3, 5, True, True, True),
    (2, 3, (2, 2), (8, 8), None, 9, True, True, True),
    (2, 4, (3, 3), (2, 3), None, 6, False, False, False),
]

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


def statistics(channels, normalised=True):
    """(mean, std) of so many channels."""
    if not normalised:
        return None, None
    return tuple(0.4 + 0.01 * c for c in range(channels)), tuple(0.2 + 0.01 * c for c in range(channels))


def positional(images, ids_keep, weight, bias, positions, mean, std, layout="nchw", backend=None):
    return visible_patch_embed(
        images, ids_keep, weight, bias, positions, mean=mean, std=std, layout=layout, backend=backend
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend, case, layout, dtype):
    batch, channels, grid, patch, kept, width, has_bias, has_positions, normalised = case
    images, ids_keep, weight, bias, positions = make(batch, channels, grid, patch, kept or 1, width, dtype=dtype)
    args = [
        layout(images), None if kept is None else ids_keep, layout(weight), bias if has_bias else None,
        layout(positions) if has_positions else None, *statistics(channels, normalised),
    ]  # fmt: skip
    wrt = [i for i in (0, 2, 3, 4) if args[i] is not None]
    assert_as_good_as_torch(positional, visible_patch_embed_ref, *args, backend=backend, wrt=wrt)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("memory", ["nchw", "nhwc", "channels_last", "slice"])
@pytest.mark.parametrize("channels, patch", [(3, (16, 16)), (3, (5, 7)), (1, (4, 4)), (13, (2, 6))])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bytes_equal_reference(backend, channels, patch, memory, normalised):
    _, ids_keep, weight, bias, positions = make(2, channels, (2, 3), patch, 4, 10)
    shape = (2, channels, 2 * patch[0], 3 * patch[1])
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    layout = "nhwc" if memory == "nhwc" else "nchw"
    if memory == "nhwc":
        pixels = pixels.permute(0, 2, 3, 1).contiguous()
    elif memory == "channels_last":
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    elif memory == "slice":
        pixels = torch.nn.functional.pad(pixels, (1, 2, 3, 4), value=255)[:, :, 3:-4, 1:-2]
    assert_as_good_as_torch(
        positional, visible_patch_embed_ref, pixels, ids_keep, weight, bias, positions,
        *statistics(channels, normalised), backend=backend, wrt=(2, 3, 4), layout=layout,
    )  # fmt: skip


def results(images, ids_keep, *parameters, **options):
    """Output and gradients of weight, bias and positions."""
    parameters = [t.detach().requires_grad_() for t in parameters]
    out = visible_patch_embed(images, ids_keep, *parameters, mean=MEAN, std=STD, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out.detach(), *torch.autograd.grad(out, parameters, cotangent)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_pixels_are_not_read(backend):
    images, ids_keep, *parameters = make(2, 3, (3, 4), (4, 4), 3, 8, device=backend.device)
    removed = torch.ones(2, 12, dtype=torch.bool, device=backend.device).scatter_(1, ids_keep, False)
    pixels = removed.view(2, 1, 3, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    poisoned = images.masked_fill(pixels, float("nan"))
    ours, expected = (results(i, ids_keep, *parameters, backend=backend) for i in (poisoned, images))
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_rows_are_written_in_its_dtype(backend, memory_format):
    images, ids_keep, weight, bias, positions = make(2, 3, (2, 3), (16, 16), 3, 24, device=backend.device)
    images = images.contiguous(memory_format=memory_format)
    kept = []
    watch = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with torch.autocast(backend.device, dtype=torch.bfloat16), watch:
        out, *gradients = results(images, ids_keep, weight, bias, positions, backend=backend)
    assert out.dtype == torch.float32  # as the positions
    assert all(g.dtype == torch.float32 for g in gradients)
    assert not [t for t in kept if t.numel() == 2 * 3 * 768 and t.dtype == torch.float32]  # no rows in fp32
    exact = results(images, ids_keep, weight, bias, positions, backend="reference")
    for ours, theirs in zip((out, *gradients), exact, strict=True):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("backend", backends_of("visible_patch_embed", isas=("avx512",)))
def test_a_patch_may_be_shown_twice(backend):
    images, _, *parameters = make(2, 3, (2, 2), (4, 4), 3, 8, device=backend.device)
    ids_keep = torch.tensor([[1, 3, 1, 1, 0], [2, 2, 2, 2, 2]], device=backend.device)
    ours = results(images, ids_keep, *parameters, backend=backend)
    for a, b in zip(ours, results(images, ids_keep, *parameters, backend="reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", backends_of("visible_patch_embed", reference=False, isas=("portable", "avx512")))
def test_runs_and_threads_do_not_change_a_bit(backend):
    sizes = (2, 3, (2, 3), (4, 4), 2, 8) if backend.interpreted else (9, 3, (7, 7), (8, 8), 12, 64)
    images, ids_keep, *parameters = make(*sizes, device=backend.device)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = visible_patch_embed(
                images, ids_keep, parameters[0], None, parameters[2].requires_grad_(), backend=backend
            )
            # The matrix product is torch's: what it makes of other threads is its own affair.
            cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
            found.append(torch.autograd.grad(out, parameters[2], cotangent))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", QUICK)
def test_more_than_two_to_the_31_elements_between_images(backend):
    images, ids_keep, weight, *_ = make(2, 3, (2, 2), (4, 4), 2, 8, device=backend.device)
    expected = visible_patch_embed(images, ids_keep, weight, None, backend=backend)
    try:
        memory = torch.empty(2**31 + images.numel(), device=backend.device)
    except RuntimeError:
        pytest.skip("no room for 8 GB of addresses")
    far = memory.as_strided(images.shape, (2**31, *images.stride()[1:])).copy_(images)
    assert torch.equal(visible_patch_embed(far, ids_keep, weight, None, backend=backend), expected)


@pytest.mark.parametrize("backend", QUICK)
def test_an_empty_batch(backend):
    images, ids_keep, *parameters = make(2, 3, (2, 2), (4, 4), 2, 8, device=backend.device)
    with poisoned_memory():
        out, *gradients = results(images[:0], ids_keep[:0], *parameters, backend=backend)
    assert list(out.shape) == [0, 2, 8]
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("backend", backends_of("visible_patch_embed", isas=("avx512",)))
def test_compiles_without_graph_breaks(backend):
    images, ids_keep, *parameters = make(2, 3, (2, 3), (4, 4), 2, 8, device=backend.device)
    parameters = [t.requires_grad_() for t in parameters]
    plain = backend.plain

    def function(weight, bias, positions):
        return visible_patch_embed(images, ids_keep, weight, bias, positions, mean=MEAN, std=STD, backend=plain)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    found = [(f(*parameters), *torch.autograd.grad(f(*parameters).sum(), parameters)) for f in (compiled, function)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", QUICK)
def test_opcheck(backend, layout):
    images, ids_keep, _, _, positions = make(2, 3, (2, 2), (4, 4), 2, 8, device=backend.device)
    tokens, positions = (layout(t).requires_grad_() for t in (torch.ones(2, 2, 8).to(images), positions))
    torch.library.opcheck(
        torch.ops.fastmim.add_positions.default, (tokens, positions, ids_keep, torch.float32, backend.plain)
    )
    torch.library.opcheck(torch.ops.fastmim.sum_by_position.default, (tokens, ids_keep, 4, backend.plain))


@pytest.mark.parametrize("backend", QUICK)
def test_a_second_derivative(backend):
    images, ids_keep, weight, bias, positions = make(2, 3, (2, 2), (4, 4), 2, 8, device=backend.device)

    def second(name):
        inputs = [t.detach().requires_grad_() for t in (weight, positions)]
        out = visible_patch_embed(images, ids_keep, inputs[0], bias, inputs[1], mean=MEAN, std=STD, backend=name)
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().mean() for g in first), inputs)

    for a, b in zip(second(backend), second("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_a_patch_that_does_not_exist_is_refused_by_the_kernel():
    images, ids_keep, weight, *_ = make(2, 3, (2, 2), (4, 4), 2, 8)
    ids_keep[1, 0] = 4
    with pytest.raises(IndexError, match=r"patch_ids holds 4, outside of 0 .. 3"):
        visible_patch_embed(images, ids_keep, weight, None, backend="cpu")


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
