import pytest
import torch
from torch.nn import functional as F

from fastmim.ops.patch_rows import patch_rows, patch_rows_ref
from tests.ops.support import LAYOUTS, assert_as_good_as_torch, backends_of, poisoned_memory

BACKENDS = backends_of("patch_rows")
KERNELS = backends_of("patch_rows", reference=False)
QUICK = backends_of("patch_rows", isas=("avx512",))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# B, C, (gh, gw), (p, q), (S, K), which ids are given
CASES = [
    (4, 3, (2, 3), (16, 16), (3, 5), "both"),
    (3, 3, (2, 2), (4, 5), (3, 2), "patches"),
    (4, 13, (3, 1), (7, 7), (2, 3), "images"),
    (2, 1, (2, 2), (8, 4), (2, 4), "none"),
    (0, 3, (2, 2), (4, 4), (0, 3), "patches"),
]


def make(case, dtype=torch.float32, device="cpu"):
    """(images, image_ids, patch_ids, scale_shift), the ids without repetition."""
    batch, channels, grid, patch, (sequences, length), given = case
    generator = torch.Generator().manual_seed(2)
    size = (batch, channels, grid[0] * patch[0], grid[1] * patch[1])
    if dtype == torch.uint8:
        images = torch.randint(0, 256, size, dtype=dtype, generator=generator)
    else:
        images = torch.randn(size, generator=generator).to(dtype)
    places = torch.randperm(max(batch * grid[0] * grid[1], 1), generator=generator)[: sequences * length]
    cells = grid[0] * grid[1]
    image_ids, patch_ids = (places // cells).reshape(sequences, length), (places % cells).reshape(sequences, length)
    if given == "patches":
        patch_ids = torch.rand(batch, cells, generator=generator).argsort(1)[:, :length]
    if given == "images":
        image_ids = torch.rand(batch, cells, generator=generator).argsort(0)[:sequences]
    scale_shift = torch.randn(2, channels, generator=generator)
    image_ids = image_ids if given in ("both", "images") else None
    patch_ids = patch_ids if given in ("both", "patches") else None
    return tuple(None if t is None else t.to(device) for t in (images, image_ids, patch_ids, scale_shift))


def test_is_what_a_convolution_multiplies():
    images, _, _, scale_shift = make(CASES[0], torch.float64)
    weight = torch.randn(7, 3, 16, 16, dtype=torch.float64)
    rows = patch_rows(images, None, None, scale_shift, (16, 16), torch.float64)
    scale, shift = scale_shift.double().view(2, 3, 1, 1)
    expected = F.conv2d(images * scale + shift, weight, stride=16).flatten(2).transpose(1, 2)
    torch.testing.assert_close(rows @ weight.flatten(1).T, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend, case, scaled, layout, dtype):
    images, image_ids, patch_ids, scale_shift = make(case, dtype)

    def run(function, images, **options):
        ids = [None if t is None else t.to(images.device) for t in (image_ids, patch_ids)]
        normalise = scale_shift.to(images.device) if scaled else None
        return function(images, *ids, normalise, case[3], images.dtype, **options)

    assert_as_good_as_torch(
        lambda x, backend: run(patch_rows, x, backend=backend), lambda x: run(patch_rows_ref, x),
        layout(images), backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES[:4])
@pytest.mark.parametrize("backend", KERNELS)
def test_bytes(backend, case, channels_last, dtype):
    """Both layouts of uint8 images, in any dtype of rows."""
    images, image_ids, patch_ids, scale_shift = make(case, torch.uint8, backend.device)
    scale_shift = scale_shift / 255
    arguments = (image_ids, patch_ids, scale_shift, case[3])
    exact = patch_rows_ref(images, *arguments, torch.float64)
    if channels_last:
        images = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    with poisoned_memory():
        rows = patch_rows(images, *arguments, dtype, backend=backend)
    assert rows.dtype == dtype
    torch.testing.assert_close(rows.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_pixels_are_not_read(backend):
    images, image_ids, patch_ids, _ = make(CASES[0], device=backend.device)
    expected = patch_rows(images, image_ids, patch_ids, None, (16, 16), torch.float32, backend=backend)
    wanted = torch.zeros(4, 2, 3, dtype=torch.bool, device=backend.device)
    wanted[image_ids, patch_ids // 3, patch_ids % 3] = True
    pixels = wanted.repeat_interleave(16, 1).repeat_interleave(16, 2).unsqueeze(1)
    images = images.masked_fill(~pixels, float("nan")).requires_grad_()
    rows = patch_rows(images, image_ids, patch_ids, None, (16, 16), torch.float32, backend=backend)
    rows.square().sum().backward()
    assert torch.equal(rows.detach(), expected)
    assert torch.equal(images.grad != 0, pixels.expand_as(images))


@pytest.mark.parametrize("backend", KERNELS)
def test_images_and_rows_may_differ_in_dtype(backend):
    images, image_ids, patch_ids, scale_shift = make(CASES[0], device=backend.device)
    rows = patch_rows(images, image_ids, patch_ids, scale_shift, (16, 16), torch.bfloat16, backend=backend)
    exact = patch_rows_ref(images, image_ids, patch_ids, scale_shift, (16, 16), torch.float64)
    torch.testing.assert_close(rows.double(), exact, rtol=2**-7, atol=1e-6)


def test_an_index_beyond_the_images_is_an_error():
    images, image_ids, patch_ids, _ = make(CASES[0])
    for ids in ((image_ids + 4, patch_ids), (image_ids, patch_ids - 6)):
        with pytest.raises(IndexError, match=r"holds .* outside of 0 \.\. "):
            patch_rows(images, *ids, None, (16, 16), torch.float32, backend="cpu")


@pytest.mark.parametrize("backend", QUICK)
def test_compiles_without_graph_breaks(backend):
    images, image_ids, patch_ids, scale_shift = make(CASES[1], device=backend.device)
    images.requires_grad_()
    plain = backend.plain

    def function(x):
        return patch_rows(x, image_ids, patch_ids, scale_shift, (4, 5), torch.float32, backend=plain).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [(f(images), *torch.autograd.grad(f(images), images)) for f in (compiled, function)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", backends_of("patch_rows", reference=False, isas=("avx512",)))
def test_opcheck(backend, layout):
    for case in CASES[1:4]:
        images, image_ids, patch_ids, scale_shift = make(case, device=backend.device)
        arguments = (image_ids, patch_ids, scale_shift, *case[3], torch.float32, backend.plain)
        torch.library.opcheck(torch.ops.fastmim.patch_rows.default, (layout(images).requires_grad_(), *arguments))


@pytest.mark.parametrize("backend", backends_of("patch_rows", reference=False, isas=("avx512",)))
def test_a_second_derivative_by_a_kernel_is_refused(backend):
    images, image_ids, patch_ids, scale_shift = make(CASES[1], device=backend.device)
    rows = patch_rows(
        images.requires_grad_(), image_ids, patch_ids, scale_shift, (4, 5), torch.float32, backend=backend
    )
    (gradient,) = torch.autograd.grad(rows.square().sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("backend", backends_of("patch_rows", reference=False, isas=("avx512",)))
def test_more_than_two_to_the_31_elements_between_images(backend):
    images, _, patch_ids, _ = make(CASES[1], device=backend.device)
    try:
        memory = torch.empty(2 * 2**31 + images.numel(), dtype=torch.uint8, device=backend.device)
    except RuntimeError:
        pytest.skip("no room for 4 GB of addresses")
    pixels = (images * 40).clamp(0, 255).to(torch.uint8)
    expected = patch_rows(pixels, None, patch_ids, None, (4, 5), torch.float32, backend=backend)
    far = memory.as_strided(pixels.shape, (2**31, *pixels.stride()[1:])).copy_(pixels)
    assert torch.equal(patch_rows(far, None, patch_ids, None, (4, 5), torch.float32, backend=backend), expected)
