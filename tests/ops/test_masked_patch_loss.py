import pytest
import torch

from fastmim.ops import masked_patch_loss, patchify
from fastmim.ops.masked_patch_loss import LOSSES, masked_patch_loss_ref
from tests.ops.support import LAYOUTS, assert_as_good_as_torch, backends_of, poisoned_memory

BACKENDS = backends_of("masked_patch_loss")
KERNELS = backends_of("masked_patch_loss", reference=False)
QUICK = backends_of("masked_patch_loss", isas=("avx512",))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# (B, C, H, W), (p, q), prediction as an image, norm_pix, loss
CASES = [
    ((2, 3, 16, 32), (16, 16), False, True, "l2"),
    ((2, 3, 8, 40), (8, 20), True, False, "l1"),
    ((1, 13, 30, 10), (10, 5), False, True, "focal_l1"),
    ((1, 13, 20, 40), (20, 20), True, True, "focal_l1"),
    ((3, 1, 7, 14), (7, 7), False, False, "l2"),
    ((2, 2, 3, 2), (1, 1), True, True, "l1"),
]
IDS = [f"{'x'.join(map(str, s))}-{p}x{q}-{'image' if im else 'rows'}-{loss}" for s, (p, q), im, _, loss in CASES]


def make(shape, patch, as_image=False, dtype=torch.float32, device="cpu"):
    """(prediction, image, mask) with at least one removed and one visible patch where there are two."""
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(shape, generator=generator).to(device, dtype)
    prediction = torch.randn(shape, generator=generator).to(device, dtype)
    rows = prediction if as_image else patchify(prediction, patch)
    cells = (shape[2] // patch[0]) * (shape[3] // patch[1])
    mask = torch.rand(shape[0] * cells, generator=generator).argsort() < (3 * shape[0] * cells + 4) // 5
    return rows, image, mask.reshape(shape[0], cells).to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape, patch, as_image, norm_pix, loss", CASES, ids=IDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend, shape, patch, as_image, norm_pix, loss, layout, dtype):
    prediction, image, mask = make(shape, patch, as_image, dtype)
    assert_as_good_as_torch(
        masked_patch_loss, masked_patch_loss_ref, layout(prediction), layout(image), mask, patch,
        backend=backend, norm_pix=norm_pix, loss=loss,
    )  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("backend", KERNELS)
def test_prediction_and_image_may_differ_in_dtype_and_layout(backend, norm_pix, loss):
    prediction, image, mask = make((2, 3, 32, 16), (16, 16), device=backend.device)
    prediction = prediction.bfloat16().requires_grad_()
    image = image.contiguous(memory_format=torch.channels_last)
    value = masked_patch_loss(prediction, image, mask, 16, norm_pix=norm_pix, loss=loss, backend=backend)
    exact = masked_patch_loss_ref(prediction.double(), image.double(), mask, 16, norm_pix, loss)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-6)


def test_is_the_loss_of_mae():
    """Written out as the paper has it: normalise all targets, mean over values, mean over removed patches."""
    prediction, image, mask = make((3, 3, 32, 48), (16, 16), dtype=torch.float64)
    target = torch.stack(
        [
            image[:, :, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16].permute(0, 2, 3, 1).reshape(3, -1)
            for y in range(2)
            for x in range(3)
        ],
        dim=1,
    )
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    expected = (((prediction - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    torch.testing.assert_close(masked_patch_loss(prediction, image, mask, 16, norm_pix=True), expected)


@pytest.mark.parametrize("loss", ["l1", "focal_l1"])
def test_is_the_spatial_loss_of_a2mim(loss):
    prediction, image, mask = make((2, 3, 32, 64), (32, 32), as_image=True, dtype=torch.float64)
    pixels = mask.reshape(2, 1, 1, 2).repeat_interleave(32, 2).repeat_interleave(32, 3).double()
    error = (prediction - image).abs()
    value = error if loss == "l1" else error * (2 * torch.sigmoid(0.2 * error) - 1)
    expected = (value * pixels).sum() / pixels.sum() / 3
    torch.testing.assert_close(masked_patch_loss(prediction, image, mask, 32, loss=loss), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_visible_patches_are_not_read(backend):
    prediction, image, mask = make((2, 3, 32, 16), (16, 16), as_image=True, device=backend.device)
    expected = masked_patch_loss(prediction, image, mask, 16, norm_pix=True, backend=backend)
    visible = ~mask.reshape(2, 1, 2, 1).repeat_interleave(16, 2).repeat_interleave(16, 3).expand_as(image)
    prediction = prediction.masked_fill(visible, float("nan")).requires_grad_()
    image = image.masked_fill(visible, float("nan"))
    value = masked_patch_loss(prediction, image, mask, 16, norm_pix=True, backend=backend)
    value.backward()
    assert torch.equal(value.detach(), expected)
    assert (prediction.grad[visible] == 0).all()
    assert (prediction.grad[~visible] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_patch_has_target_zero(backend):
    prediction, _, mask = make((1, 3, 16, 32), (16, 16), device=backend.device)
    image = torch.full((1, 3, 16, 32), 0.7, device=backend.device)
    value = masked_patch_loss(prediction.requires_grad_(), image, mask, 16, norm_pix=True, backend=backend)
    value.backward()
    assert torch.isfinite(prediction.grad).all()
    torch.testing.assert_close(value, prediction[mask].square().mean(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 16, 16), (1, 3, 16, 32)])
def test_nothing_removed_is_zero_and_finite(backend, shape):
    prediction, image, mask = make(shape, (16, 16), device=backend.device)
    prediction.requires_grad_()
    with poisoned_memory():
        value = masked_patch_loss(prediction, image, torch.zeros_like(mask), 16, norm_pix=True, backend=backend)
        value.backward()
    assert value.item() == 0
    assert (prediction.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_removed_value_counts_the_same(backend):
    """Images with different numbers of removed patches: the mean is over values, not over images."""
    prediction, image, _ = make((2, 1, 8, 24), (8, 8), device=backend.device)
    mask = torch.tensor([[True, True, True], [False, True, False]], device=backend.device)
    rows = (prediction - patchify(image, 8))[mask]
    value = masked_patch_loss(prediction, image, mask, 8, backend=backend)
    torch.testing.assert_close(value, rows.square().mean())


def test_no_targets_are_kept_for_the_backward_pass():
    prediction, image, mask = make((2, 3, 32, 32), (16, 16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        masked_patch_loss(prediction.requires_grad_(), image, mask, 16, norm_pix=True, backend="cpu")
    own = [t for t in kept if t.data_ptr() not in (prediction.data_ptr(), image.data_ptr(), mask.data_ptr())]
    assert sum(t.numel() for t in own) == 2 * mask.numel() + 1


@pytest.mark.parametrize("as_image", [False, True])
@pytest.mark.parametrize("backend", backends_of("masked_patch_loss", reference=False, isas=("portable", "avx512")))
def test_runs_and_threads_do_not_change_a_bit(backend, as_image):
    shape = (2, 3, 32, 32) if backend.label == "triton-cpu" else (5, 3, 112, 96)
    prediction, image, mask = make(shape, (16, 16), as_image, device=backend.device)
    prediction.requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            value = masked_patch_loss(prediction, image, mask, 16, norm_pix=True, backend=backend)
            results.append((value, *torch.autograd.grad(value, prediction)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("as_image", [False, True])
def test_a_large_gradient_is_written_around_the_caches(as_image):
    """Above 8 MB the CPU kernel stores past the caches; the numbers are the same."""
    prediction, image, mask = make((16, 3, 224, 224), (16, 16), as_image)
    prediction.requires_grad_()
    with poisoned_memory():
        value = masked_patch_loss(prediction, image, mask, 16, norm_pix=True, backend="cpu")
        (gradient,) = torch.autograd.grad(value, prediction)
    (expected,) = torch.autograd.grad(masked_patch_loss_ref(prediction, image, mask, 16, True), prediction)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-11)


@pytest.mark.parametrize("backend", backends_of("masked_patch_loss", reference=False, isas=("avx512",)))
def test_more_than_two_to_the_31_elements_between_images(backend):
    prediction, image, mask = make((2, 3, 16, 16), (8, 8), as_image=True, device=backend.device)
    expected = masked_patch_loss(prediction, image, mask, 8, norm_pix=True, backend=backend)
    try:
        memory = torch.empty(2**31 + image.numel(), dtype=torch.float32, device=backend.device)
    except RuntimeError:
        pytest.skip("no room for 8 GB of addresses")
    far = memory.as_strided(image.shape, (2**31, *image.stride()[1:])).copy_(image)
    assert torch.equal(masked_patch_loss(prediction, far, mask, 8, norm_pix=True, backend=backend), expected)
    far.copy_(prediction)
    assert torch.equal(masked_patch_loss(far, image, mask, 8, norm_pix=True, backend=backend), expected)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("as_image", [False, True])
def test_gradients_of_the_reference(as_image, loss):
    prediction, image, mask = make((2, 2, 4, 6), (2, 3), as_image, torch.float64)

    def function(guess):
        return masked_patch_loss(guess, image, mask, (2, 3), norm_pix=True, loss=loss)

    prediction.requires_grad_()
    assert torch.autograd.gradcheck(function, prediction)
    assert torch.autograd.gradgradcheck(function, prediction)


@pytest.mark.parametrize("backend", backends_of("masked_patch_loss", reference=False, isas=("avx512",)))
def test_a_second_derivative_by_a_kernel_is_refused(backend):
    prediction, image, mask = make((1, 3, 8, 16), (8, 8), device=backend.device)
    value = masked_patch_loss(prediction.requires_grad_(), image, mask, 8, backend=backend)
    (gradient,) = torch.autograd.grad(value, prediction, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        gradient.square().sum().backward()


def test_the_image_gets_no_gradient():
    prediction, image, mask = make((2, 3, 16, 16), (8, 8))
    for backend in ("reference", "cpu"):
        value = masked_patch_loss(
            prediction.requires_grad_(), image.requires_grad_(), mask, 8, norm_pix=True, backend=backend
        )
        assert torch.autograd.grad(value, image, allow_unused=True) == (None,)


@pytest.mark.parametrize("backend", QUICK)
def test_compiles_without_graph_breaks(backend):
    prediction, image, mask = make((2, 3, 16, 32), (16, 16), device=backend.device)
    prediction.requires_grad_()
    plain = backend.plain

    def function(guess):
        return masked_patch_loss(guess, image, mask, 16, norm_pix=True, backend=plain)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [(f(prediction), *torch.autograd.grad(f(prediction), prediction)) for f in (compiled, function)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", backends_of("masked_patch_loss", reference=False, isas=("avx512",)))
def test_opcheck(backend, layout):
    prediction, image, mask = make((1, 3, 8, 16), (8, 8), as_image=True, device=backend.device)
    prediction, image = layout(prediction).requires_grad_(), layout(image)
    arguments = (prediction, image, mask, 8, 8, True, "focal_l1", backend.plain)
    torch.library.opcheck(torch.ops.fastmim.masked_patch_loss.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"prediction": torch.zeros(2, 4, 12)},
            r"patches \[2, 4, 192\] or an image \[2, 3, 16, 16\], got \[2, 4, 12\]",
        ),
        ({"image": torch.zeros(2, 3, 16, 20)}, "16x20 pixels does not divide into patches of 8x8"),
        ({"image": torch.zeros(3, 16, 16)}, r"image must be \[B, C, H, W\], got \[3, 16, 16\]"),
        ({"mask": torch.zeros(2, 5, dtype=torch.bool)}, r"mask is \[2, 5\], expected \[2, 4\]"),
        ({"mask": torch.zeros(2, 4)}, "mask must be bool"),
        ({"image": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)}, "floating point, got torch.float32 and torch.uint8"),
        ({"loss": "l3"}, "one of l2, l1, focal_l1, got 'l3'"),
        ({"patch_size": 0}, "at least 1 x 1"),
        ({"image": torch.zeros(2, 3, 16, 16, dtype=torch.float64), "backend": "cpu"}, "does not take torch.float64"),
    ],
)
def test_names_what_does_not_fit(change, message):
    prediction, image, mask = make((2, 3, 16, 16), (8, 8))
    arguments = {"prediction": prediction, "image": image, "mask": mask, "patch_size": 8} | change
    with pytest.raises(ValueError, match=message):
        masked_patch_loss(**arguments)
