import pytest
import torch

from fastmim.ops import frequency_loss, masked_patch_loss, upsample_mask
from fastmim.ops.frequency_loss import frequency_loss_ref
from tests.ops.support import LAYOUTS, assert_as_good_as_torch, backends_of, poisoned_memory

BACKENDS = backends_of("frequency_loss")
KERNELS = backends_of("frequency_loss", reference=False)
QUICK = backends_of("frequency_loss", isas=("avx512",))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REPLACEMENTS = ["target", "prediction", "mixed", "mean"]
SHAPES = [((2, 3, 16, 32), (8, 8)), ((3, 1, 15, 21), (5, 7)), ((1, 13, 6, 10), (3, 2)), ((2, 2, 4, 1), (2, 1))]

# Every path through the spectrum.
WAYS = {
    "paper": {},
    "paper_modulus": {"distance": "modulus", "normalise": "none", "alpha": 2.0},
    "paper_alpha": {"alpha": 0.7, "reduce": "sum"},
    "paper_unweighted": {"focal": False},
    "code": {"form": "code"},
    "code_alpha": {"form": "code", "alpha": 1.5, "reduce": "sum"},
    "code_l1": {"form": "code", "focal": False},
    "code_focal_l1": {"form": "code", "focal": False, "spatial": "focal_l1"},
}


def make(shape, patch, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(shape, generator=generator).to(device, dtype)
    prediction = torch.randn(shape, generator=generator).to(device, dtype)
    cells = (shape[2] // patch[0]) * (shape[3] // patch[1])
    mask = torch.rand(shape[0] * cells, generator=generator).argsort() < (3 * shape[0] * cells + 4) // 5
    return prediction, image, mask.reshape(shape[0], cells).to(device)


def pixels(mask, shape, patch):
    return upsample_mask(mask, (shape[2] // patch[0], shape[3] // patch[1]), shape[2:]).unsqueeze(1)


def by_definition(
    prediction, image, mask, patch, *, form="paper", focal=True, alpha=1.0, distance="squared", normalise="image_max",
    reduce="mean", visible_weight=0.0, replacement="target", spatial="l1",
):  # fmt: skip
    """As the papers have it: compose an image, transform it and the true one in full, weight what differs."""
    removed = pixels(mask, image.shape, patch).to(image.dtype)
    kept = removed + (1 - removed) * visible_weight
    other = {
        "target": image,
        "prediction": prediction.detach(),
        "mixed": 0.5 * prediction.detach() + 0.5 * image,
        "mean": image.mean(dim=(2, 3), keepdim=True).expand_as(image),
    }[replacement]
    shown, true = (torch.fft.fft2(x, norm="ortho") for x in (prediction * kept + other * (1 - kept), image))
    if form == "code" and focal:
        squares = (shown.mean(0) - true.mean(0)).abs() ** 2
        weight = torch.log(1 + squares.detach() ** (alpha / 2))
        weight = torch.nan_to_num(weight / weight.max(), nan=0.0).clamp(0, 1)
        value = (weight * squares).unsqueeze(0)
    elif form == "code":
        modulus = (shown - true).abs()
        value = modulus if spatial == "l1" else modulus * (2 * torch.sigmoid(0.2 * modulus) - 1)
    else:
        modulus = (shown - true).abs()
        weight = modulus.detach() ** (alpha if focal else 0)
        if normalise == "image_max":
            weight = weight / weight.amax(dim=(1, 2, 3), keepdim=True)
        value = weight * (modulus**2 if distance == "squared" else modulus)
    return value.mean() if reduce == "mean" else value.sum(dim=(1, 2, 3)).mean()


def value_and_gradient(function, prediction):
    prediction = prediction.detach().clone().requires_grad_()
    value = function(prediction)
    return value.detach(), torch.autograd.grad(value, prediction)[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("visible_weight", [0.0, 1e-3, 0.3])
@pytest.mark.parametrize("replacement", REPLACEMENTS)
@pytest.mark.parametrize("shape, patch", SHAPES[:3])
def test_one_transform_of_a_scaled_error_is_the_definition(shape, patch, replacement, visible_weight, way):
    """3.6 (b), in fp64."""
    prediction, image, mask = make(shape, patch, torch.float64)
    options = {"replacement": replacement, "visible_weight": visible_weight, **WAYS[way]}
    ours = value_and_gradient(lambda x: frequency_loss(x, image, mask, patch, **options), prediction)
    exact = value_and_gradient(lambda x: by_definition(x, image, mask, patch, **options), prediction)
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).abs().max() <= 1e-12 * max(1, b.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way, shape, patch, replacement, visible_weight", [
    ("paper", *SHAPES[0], "target", 0.0),
    ("paper_modulus", *SHAPES[1], "mixed", 1e-3),
    ("paper_alpha", *SHAPES[2], "prediction", 0.5),
    ("code", *SHAPES[0], "mixed", 0.0),
    ("code_alpha", *SHAPES[1], "mean", 1e-3),
    ("code_focal_l1", *SHAPES[2], "mean", 0.0),
    ("code_l1", *SHAPES[3], "mixed", 0.0),
])  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend, way, shape, patch, replacement, visible_weight, layout, dtype):
    """Three times torch's error, not two: one frequency, the greatest, scales the whole loss, so its last bit shows."""
    prediction, image, mask = make(shape, patch, dtype)
    assert_as_good_as_torch(
        frequency_loss, frequency_loss_ref, layout(prediction), layout(image), mask, patch, backend=backend, slack=3.0,
        replacement=replacement, visible_weight=visible_weight, **WAYS[way],
    )  # fmt: skip


@pytest.mark.parametrize("replacement", REPLACEMENTS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", KERNELS)
def test_every_way_and_replacement(backend, way, replacement):
    prediction, image, mask = make((2, 2, 6, 10), (3, 2), device=backend.device)
    options = {"replacement": replacement, "visible_weight": 0.1, **WAYS[way]}
    with poisoned_memory():
        ours = value_and_gradient(
            lambda x: frequency_loss(x, image, mask, (3, 2), backend=backend, **options), prediction
        )
    exact = value_and_gradient(lambda x: by_definition(x, image.double(), mask, (3, 2), **options), prediction.double())
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("way", ["paper", "code", "code_l1"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_right_prediction_costs_nothing_unless_visible_pixels_are_shown(backend, way):
    """3.6 (a): with the target behind, only w_f of the visible errors is seen; 'mixed' still sees half of them."""
    prediction, image, mask = make((2, 3, 16, 24), (8, 8), device=backend.device)
    prediction = torch.where(pixels(mask, image.shape, (8, 8)), image, prediction)

    def run(**options):
        return value_and_gradient(
            lambda x: frequency_loss(x, image, mask, 8, backend=backend, **WAYS[way], **options), prediction
        )

    value, gradient = run()
    assert value == 0
    assert (gradient == 0).all()
    full, _ = run(replacement="prediction")
    small, gradient = run(visible_weight=1e-3)
    assert 0 < small < 2e-3 * full
    assert torch.isfinite(gradient).all()
    value, gradient = run(replacement="mixed")
    assert value > 0.05 * full
    assert (gradient[~pixels(mask, image.shape, (8, 8)).expand_as(gradient)] == 0).all()


def test_mean_over_the_batch_then_transform_is_transform_then_mean():
    """3.6 (c), both ways in fp64 without any masking."""
    prediction, image, mask = make((4, 3, 12, 10), (4, 5), torch.float64)
    spectra = torch.fft.fft2(prediction - image, norm="ortho").mean(0)
    squares = spectra.abs() ** 2
    weight = torch.log1p(spectra.abs())
    expected = (weight / weight.max() * squares).mean()
    value = frequency_loss(prediction, image, torch.ones_like(mask), (4, 5), form="code")
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opposite_errors_cancel_in_the_code_form_only(backend):
    _, image, mask = make((2, 3, 16, 16), (8, 8), device=backend.device)
    error = torch.randn(1, 3, 16, 16, device=backend.device)
    prediction, mask = image + torch.cat((error, -error)), torch.ones_like(mask)
    assert frequency_loss(prediction, image, mask, 8, form="code", backend=backend) < 1e-10
    assert frequency_loss(prediction, image, mask, 8, form="paper", backend=backend) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_unnormalised_modulus_is_half_the_squared_error_of_pixels(backend):
    """3.6 (d), Parseval: with these options the Fourier term does nothing of its own."""
    prediction, image, mask = make((2, 3, 16, 24), (8, 8), device=backend.device)
    options = {"distance": "modulus", "normalise": "none", "reduce": "mean", "backend": backend}
    value, gradient = value_and_gradient(lambda x: frequency_loss(x, image, mask, 8, **options), prediction)
    removed = pixels(mask, image.shape, (8, 8))
    expected = (prediction - image) * removed / prediction.numel()
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(value, ((prediction - image) * removed).square().mean(), rtol=1e-5, atol=0)
    l2 = value_and_gradient(lambda x: 0.5 * masked_patch_loss(x, image, mask, 8), prediction)[1]
    torch.testing.assert_close(gradient, l2 * mask.double().mean().item(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 2), (2, 3), (6, 7), (7, 6), (4, 8)])
def test_half_a_spectrum_counts_as_the_whole(size):
    """3.6 (e), odd and even sizes."""
    prediction, image, _ = make((2, 3, *size), (1, 1), torch.float64)
    mask = torch.ones(2, size[0] * size[1], dtype=torch.bool)
    for options in WAYS.values():
        ours = value_and_gradient(lambda x, o=options: frequency_loss(x, image, mask, 1, **o), prediction)
        whole = value_and_gradient(lambda x, o=options: by_definition(x, image, mask, (1, 1), **o), prediction)
        for a, b in zip(ours, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_under_autocast_gives_a_finite_fp32_loss(backend, dtype, form):
    """3.6 (g); errors of a few hundred, whose squares and sums fp16 cannot hold."""
    prediction, image, mask = make((2, 3, 16, 16), (8, 8), dtype, backend.device)
    prediction = (300 * prediction).requires_grad_()
    with torch.autocast(backend.device, dtype=dtype):
        value = frequency_loss(prediction, image, mask, 8, form=form, backend=backend)
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert prediction.grad.dtype == dtype
    assert torch.isfinite(prediction.grad).all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_error_at_all_is_zero_with_a_finite_gradient(backend, way):
    _, image, mask = make((2, 3, 8, 8), (4, 4), device=backend.device)
    value, gradient = value_and_gradient(
        lambda x: frequency_loss(x, image, mask, 4, backend=backend, **WAYS[way]), image
    )
    assert value == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch_is_zero(backend, form):
    prediction, image, mask = make((0, 3, 8, 8), (4, 4), device=backend.device)
    value, gradient = value_and_gradient(
        lambda x: frequency_loss(x, image, mask, 4, form=form, backend=backend), prediction
    )
    assert value == 0
    assert gradient.shape == prediction.shape


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_visible_pixels_without_weight_are_not_read(backend, form):
    prediction, image, mask = make((2, 3, 16, 16), (8, 8), device=backend.device)
    expected = frequency_loss(prediction, image, mask, 8, form=form, backend=backend)
    visible = ~pixels(mask, image.shape, (8, 8)).expand_as(image)
    value, gradient = value_and_gradient(
        lambda x: frequency_loss(x, image.masked_fill(visible, float("nan")), mask, 8, form=form, backend=backend),
        prediction.masked_fill(visible, float("nan")),
    )
    assert torch.equal(value, expected)
    assert (gradient[visible] == 0).all()


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("backend", backends_of("frequency_loss", reference=False, isas=("avx512",)))
def test_more_than_two_to_the_31_elements_between_images(backend, form):
    prediction, image, mask = make((2, 3, 16, 16), (8, 8), device=backend.device)
    expected = frequency_loss(prediction, image, mask, 8, form=form, backend=backend)
    try:
        memory = torch.empty(2**31 + image.numel(), dtype=torch.float32, device=backend.device)
    except RuntimeError:
        pytest.skip("no room for 8 GB of addresses")
    far = memory.as_strided(image.shape, (2**31, *image.stride()[1:])).copy_(image)
    assert torch.equal(frequency_loss(prediction, far, mask, 8, form=form, backend=backend), expected)


@pytest.mark.parametrize("options", [{"focal": False}, {"form": "code", "focal": False, "spatial": "focal_l1"}])
def test_gradients_of_the_reference(options):
    """Only where no weight or replacement is held constant: a difference quotient knows nothing of constants."""
    prediction, image, mask = make((2, 2, 4, 6), (2, 3), torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: frequency_loss(x, image, mask, (2, 3), visible_weight=0.2, **options), prediction.requires_grad_()
    )


@pytest.mark.parametrize("backend", backends_of("frequency_loss", reference=False, isas=("avx512",)))
def test_the_gradient_is_a_constant(backend):
    """A second derivative fails, whether by the prediction or by a learned weight of the loss."""
    prediction, image, mask = make((1, 3, 8, 16), (8, 8), device=backend.device)
    value = frequency_loss(prediction.requires_grad_(), image, mask, 8, backend=backend)
    assert not torch.autograd.grad(value, prediction, create_graph=True)[0].requires_grad
    weight = torch.ones((), device=backend.device, requires_grad=True)
    value = weight * frequency_loss(prediction, image, mask, 8, backend=backend)
    (gradient,) = torch.autograd.grad(value, prediction, create_graph=True)
    with pytest.raises(RuntimeError, match="there is no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("backend", backends_of("frequency_loss", reference=False, isas=("portable", "avx512")))
def test_runs_and_threads_do_not_change_a_bit(backend, form):
    shape = (2, 3, 32, 32) if backend.label == "triton-cpu" else (5, 3, 96, 112)
    prediction, image, mask = make(shape, (16, 16), device=backend.device)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                value_and_gradient(
                    lambda x: frequency_loss(x, image, mask, 16, form=form, replacement="mixed", backend=backend),
                    prediction,
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("backend", QUICK)
def test_compiles_without_graph_breaks(backend, form):
    prediction, image, mask = make((2, 3, 8, 16), (8, 8), device=backend.device)
    plain = backend.plain

    def function(guess):
        return frequency_loss(guess, image, mask, 8, form=form, replacement="mixed", backend=plain)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(value_and_gradient(compiled, prediction), value_and_gradient(function, prediction), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("backend", backends_of("frequency_loss", reference=False, isas=("avx512",)))
def test_opcheck(backend, form, layout):
    prediction, image, mask = make((2, 3, 4, 6), (2, 3), device=backend.device)
    options = [form, True, 1.0, "squared", "image_max", "mean", 1e-3, "mean", "l1"]
    torch.library.opcheck(
        torch.ops.fastmim.frequency_loss.default,
        (layout(prediction).requires_grad_(), layout(image), mask, 2, 3, *options, backend.plain),
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prediction": torch.zeros(2, 3, 8, 16)}, r"got \[2, 3, 8, 16\] and \[2, 3, 16, 16\]"),
        ({"mask": torch.zeros(2, 5, dtype=torch.bool)}, r"mask is \[2, 5\], expected \[2, 4\]"),
        ({"patch_size": 7}, "16x16 pixels does not divide into patches of 7x7"),
        ({"image": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)}, "floating point"),
        ({"form": "papers"}, "form must be one of paper, code, got 'papers'"),
        ({"replacement": "zero"}, "replacement must be one of target, prediction, mixed, mean, got 'zero'"),
        ({"form": "code", "distance": "modulus"}, "distance and normalise belong to form 'paper'"),
        ({"alpha": -1.0}, "alpha must not be negative, got -1"),
        ({"visible_weight": 2.0}, "visible_weight must be from 0 to 1, got 2"),
    ],
)
def test_names_what_does_not_fit(change, message):
    prediction, image, mask = make((2, 3, 16, 16), (8, 8))
    arguments = {"prediction": prediction, "image": image, "mask": mask, "patch_size": 8} | change
    with pytest.raises(ValueError, match=message):
        frequency_loss(**arguments)
