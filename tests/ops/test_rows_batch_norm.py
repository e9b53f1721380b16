"""rows_batch_norm: torch's batch norm, sum and ReLU; what it keeps; running statistics; refusals."""

import pytest
import torch
import torch.nn.functional as F

from fastmim.ops import rows_batch_norm
from fastmim.ops.rows_batch_norm import rows_batch_norm_ref
from fastmim.ops.rows_norm_steps import RowsNorm, gradient_sums, input_gradient, moments, normalise
from tests.ops.support import LAYOUTS, assert_as_good_as_torch, backends_of, poisoned_memory

BACKENDS = backends_of("rows_batch_norm")
KERNELS = backends_of("rows_batch_norm", reference=False)
QUICK = backends_of("rows_batch_norm", isas=("avx512",))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 5, 4, 4, 20), (3, 7), (2, 100, 64), (1, 2, 1, 1, 530), (4, 300, 33)]
PARTS = [  # residual, factor, relu
    (False, False, False),
    (False, False, True),
    (True, False, False),
    (True, False, True),
    (False, True, True),
    (True, True, True),
    (True, True, False),
]


def make(shape, dtype=torch.float32, device="cpu", residual=True, factor=True):
    """(x, running_mean, running_var, weight, bias, residual, factor)."""
    generator = torch.Generator().manual_seed(7)
    channels = shape[-1]
    x = torch.randn(shape, generator=generator) * 2 + torch.linspace(-3, 3, channels)
    mean, variance, weight, bias = (torch.randn(channels, generator=generator) for _ in range(4))
    added = torch.randn(shape, generator=generator) if residual else None
    times = torch.tensor([1.25, 0.0, 1.25, 1.25])[: shape[0]] if factor else None
    parts = (x, mean, 0.5 + variance.square(), weight, bias, added, times)
    return tuple(None if part is None else part.to(device, dtype) for part in parts)


def positional(function):
    """Of x, weight, bias, residual and factor, with statistics of the batch or those that are given."""

    def run(x, weight, bias, residual, factor, mean, variance, **options):
        return function(
            x, mean, variance, weight, bias, mean is None, eps=1e-3, residual=residual, factor=factor, **options
        )

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual, factor, relu", PARTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend, shape, residual, factor, relu, dtype):
    x, mean, variance, weight, bias, residual, factor = make(shape, dtype, "cpu", residual, factor)
    for statistics in ((None, None), (mean, variance)):
        assert_as_good_as_torch(
            positional(rows_batch_norm), positional(rows_batch_norm_ref),
            x, weight, bias, residual, factor, *statistics,
            backend=backend, wrt=(0, 1, 2) if residual is None else (0, 1, 2, 3), relu=relu,
        )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", QUICK)
def test_any_layout_will_do(backend, layout):
    x, _, _, weight, bias, residual, factor = make((3, 4, 2, 2, 21))
    assert_as_good_as_torch(
        positional(rows_batch_norm), positional(rows_batch_norm_ref),
        layout(x), layout(weight), bias, layout(residual), factor, None, None,
        backend=backend, wrt=(0, 1, 2, 3), relu=True,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_weight_and_bias(backend):
    x, *_ = make((2, 30, 40), device=backend.device)
    out = rows_batch_norm(x, None, None, training=True, relu=True, backend=backend)
    expected = F.relu(F.batch_norm(x.reshape(-1, 40).double(), None, None, training=True)).reshape(x.shape)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_mean_far_from_zero_does_not_drown_the_variance(backend):
    x, *_ = make((2, 400, 17), device=backend.device)
    x = 0.01 * x + 1000
    out = rows_batch_norm(x, None, None, training=True, eps=1e-12, backend=backend)
    exact = F.batch_norm(x.reshape(-1, 17).double(), None, None, training=True, eps=1e-12).reshape(x.shape)
    torch.testing.assert_close(out.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("momentum", [0.1, 1.0, torch.tensor(0.25)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_running_statistics_are_torchs(backend, dtype, momentum):
    x, mean, variance, *_ = (None if t is None else t.to(backend.device) for t in make((2, 9, 20), dtype))
    expected = [mean.float(), variance.float()]
    F.batch_norm(x.reshape(-1, 20).float(), *expected, training=True, momentum=float(momentum))
    statistics = [mean.float(), variance.float()]
    rows_batch_norm(x, *statistics, training=True, momentum=momentum, backend=backend)
    torch.testing.assert_close(statistics, expected)
    before = [t.clone() for t in statistics]
    rows_batch_norm(x, *statistics, training=False, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, statistics, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_is_passed_on(backend):
    x, mean, variance, weight, bias, residual, _ = make((2, 9, 20), device=backend.device)
    x[1, 2, 3] = float("nan")
    out = rows_batch_norm(x, mean, variance, weight, bias, relu=True, residual=residual, backend=backend)
    assert out.isnan().nonzero().tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("backend", QUICK)
def test_what_is_done_in_place_to_the_result_is_noticed(backend):
    x, _, _, weight, bias, residual, _ = make((2, 9, 20), device=backend.device)
    out = rows_batch_norm(
        x.requires_grad_(), None, None, weight, bias, True, residual=residual, relu=True, backend=backend
    )
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("residual", [False, True])
def test_the_kernel_keeps_its_input_and_its_result_at_most(residual):
    x, _, _, weight, bias, added, _ = make((2, 9, 20), residual=residual)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = rows_batch_norm(
            x.requires_grad_(), None, None, weight, bias, True, residual=added, relu=True, backend="cpu"
        )
    large = {t.data_ptr() for t in kept if t.numel() == x.numel()}
    assert large == ({x.data_ptr(), out.data_ptr()} if residual else {x.data_ptr()})


@pytest.mark.parametrize("backend", KERNELS)
def test_runs_and_threads_do_not_change_a_bit(backend):
    x, _, _, weight, bias, residual, factor = (
        t.to(backend.device).requires_grad_(i < 5) for i, t in enumerate(make((4, 300, 33)))
    )
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with poisoned_memory():
                out = rows_batch_norm(
                    x, None, None, weight, bias, True, residual=residual, factor=factor, relu=True, backend=backend
                )
                results.append([out, *torch.autograd.grad(out.square().sum(), [x, weight, bias])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("residual, factor, relu", PARTS)
def test_gradients_of_the_reference(residual, factor, relu):
    x, mean, variance, weight, bias, residual, factor = make((2, 3, 4), torch.float64, "cpu", residual, factor)
    inputs = [t for t in (x, weight, bias, residual) if t is not None]
    for statistics in ((None, None), (mean, variance)):
        assert torch.autograd.gradcheck(
            lambda x, w, b, r=None, s=statistics: positional(rows_batch_norm)(x, w, b, r, factor, *s, relu=relu),
            [t.requires_grad_() for t in inputs],
        )


@pytest.mark.parametrize("residual, factor, relu", PARTS)
@pytest.mark.parametrize("fixed", [False, True])
def test_the_passes_in_plain_torch_are_its_gradients(residual, factor, relu, fixed):
    """What several processes put together on devices without a kernel."""
    x, mean, variance, weight, bias, residual, factor = make((3, 5, 6), torch.float64, "cpu", residual, factor)
    inputs = [t.requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    given = (mean, variance) if fixed else (None, None)
    expected = rows_batch_norm(
        x, *given, weight, bias, not fixed, residual=residual, factor=factor, relu=relu, backend="reference"
    )
    gradient = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, gradient)
    with torch.no_grad():
        norm = RowsNorm(weight, bias, factor, 1e-5, relu, "reference")
        mean, variance = given if fixed else moments(x, norm)
        out = normalise(x, residual, norm, mean, variance)
        sums, masked = gradient_sums(gradient, x, out if relu and residual is not None else None, norm, mean, variance)
        x_gradient = input_gradient(gradient, x, masked, norm, mean, variance, None if fixed else sums / 15)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close((x_gradient, sums[1], sums[0]), wanted[:3])
    if masked is not None:
        torch.testing.assert_close(masked, wanted[3])


@pytest.mark.parametrize("residual, factor, relu", PARTS)
@pytest.mark.parametrize("backend", backends_of("rows_batch_norm", isas=("avx512",), reference=False))
def test_opcheck(backend, residual, factor, relu):
    x, mean, variance, weight, bias, residual, factor = (
        None if t is None else t.to(backend.device) for t in make((2, 3, 4), torch.float32, "cpu", residual, factor)
    )
    for part in (x, weight, bias, residual):
        if part is not None:
            part.requires_grad_()
    for given in ((None, None), (mean, variance)):
        torch.library.opcheck(
            torch.ops.fastmim.rows_batch_norm.default,
            (x, residual, weight, bias, factor, *given, 1e-5, relu, backend.plain),
        )


@pytest.mark.parametrize("backend", QUICK)
def test_torch_compile_takes_it_whole(backend):
    name = None if backend.plain == "cpu" else backend.plain

    def step(x, mean, variance, weight, bias, residual):
        return rows_batch_norm(x, mean, variance, weight, bias, True, residual=residual, relu=True, backend=name).sin()

    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        x, mean, variance, weight, bias, residual, _ = make((2, 9, 20), device=backend.device)
        out = function(x.requires_grad_(), mean, variance, weight.requires_grad_(), bias, residual)
        results.append([out, mean, variance, *torch.autograd.grad(out.sum(), [x, weight])])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_meant_for_other_operations_does_not_stop_it(name, monkeypatch):
    x, mean, variance, *_ = make((2, 9, 20))
    expected = rows_batch_norm(x, mean, variance, backend="reference")
    monkeypatch.setenv("FASTMIM_BACKEND", name)
    assert torch.equal(rows_batch_norm(x, mean, variance), expected)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"x": torch.zeros(5)}, r"x must be \[B, ..., C\] and floating point, got torch.float32 \[5\]"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, "floating point, got torch.int64"),
        ({"x": torch.zeros(0, 4)}, r"more than one row is needed, x is \[0, 4\]"),
        ({"x": torch.zeros(1, 1, 4)}, r"more than one row is needed, x is \[1, 1, 4\]"),
        ({"weight": torch.ones(3)}, r"weight is \[3\], x has 4 channels"),
        ({"running_mean": torch.ones(4)}, "running_mean and running_var go together"),
        ({"training": False}, "needed unless training is True"),
        ({"residual": torch.zeros(2, 3, 5)}, r"residual is torch.float32 \[2, 3, 5\], x is torch.float32 \[2, 3, 4\]"),
        ({"residual": torch.zeros(2, 3, 4).bfloat16()}, "residual is torch.bfloat16"),
        ({"factor": torch.ones(3)}, r"factor is \[3\], x has 2 images"),
        ({"backend": "cuda"}, "no cuda kernel"),
    ],
)
def test_what_does_not_fit_is_named(changes, reason):
    arguments = {"x": torch.zeros(2, 3, 4), "running_mean": None, "running_var": None, "training": True} | changes
    with pytest.raises(ValueError, match=f"rows_batch_norm: .*{reason}"):
        rows_batch_norm(**arguments)
