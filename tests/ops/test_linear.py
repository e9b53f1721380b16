"""linear: torch's own meaning and every derivative by another library, and only where that library is faster."""

import importlib

import pytest
import torch
from torch.nn import functional as F

from fastmim.ops.linear import linear, why_not_onednn

operation = importlib.import_module("fastmim.ops.linear")  # fastmim.ops.linear is also the function's name
needs_onednn = pytest.mark.skipif(bool(why_not_onednn()), reason=why_not_onednn() or "runs")


def inputs(rows=(3, 130), features=190, out=260, bias=True):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*rows, features, generator=generator)
    weight = torch.randn(out, features, generator=generator) / features**0.5
    return x, weight, torch.randn(out, generator=generator) if bias else None


def with_gradients(function, x, weight, bias, dtype=torch.float32):
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
    out = function(*leaves)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out).sin())
    return [out.detach(), *(t.grad for t in leaves if t is not None)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(390,), (3, 130), (2, 3, 65), ()])
def test_as_exact_as_torch(rows, bias, monkeypatch):
    monkeypatch.setattr(operation, "_SMALLEST", 0)
    given = inputs(rows, bias=bias)
    found, theirs = with_gradients(linear, *given), with_gradients(F.linear, *given)
    exact = with_gradients(F.linear, *given, dtype=torch.float64)
    for ours, torchs, right in zip(found, theirs, exact, strict=True):
        assert ours.shape == right.shape
        assert (ours - right).abs().max() <= 2 * (torchs - right).abs().max() + 1e-6 * right.abs().max()


@needs_onednn
def test_goes_to_onednn_where_it_pays_and_nowhere_else(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.ops.fastmim, "linear", lambda x, *_: asked.append(x.shape) or x.new_zeros(x.shape[0], 260)
    )
    x, weight, bias = inputs()
    linear(x, weight, bias)
    assert asked.pop() == (390, 190)
    linear(x[:, :4], weight, bias)  # too small
    linear(x.double(), weight.double(), bias.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    monkeypatch.setenv("FASTMIM_BACKEND", "reference")
    linear(x, weight, bias)
    assert not asked


@pytest.mark.parametrize(
    "vendor, capability, reason",
    [("GenuineIntel", "AVX512", "MKL uses AVX-512"), ("AuthenticAMD", "AVX2", "AVX-512 on")],
)
def test_says_why_not(monkeypatch, vendor, capability, reason):
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        pytest.skip("this torch has no choice between MKL and oneDNN")
    monkeypatch.setattr(operation, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert reason in why_not_onednn.__wrapped__()


@needs_onednn
def test_strides_do_not_matter():
    x, weight, bias = inputs((3, 150))
    cut = x[:, 10:140]
    assert torch.equal(linear(cut, weight, bias), linear(cut.contiguous(), weight, bias))
    torch.testing.assert_close(linear(x, weight.t().contiguous().t(), bias), linear(x, weight, bias))


@needs_onednn
def test_operator_is_registered_whole():
    x, weight, bias = inputs((20,), 24, 12)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(torch.ops.fastmim.linear.default, tuple(leaves))
    torch.library.opcheck(torch.ops.fastmim.linear.default, (leaves[0], leaves[1], None))


@needs_onednn
def test_has_second_derivatives(monkeypatch):
    monkeypatch.setattr(operation, "_SMALLEST", 0)
    x, weight, bias = (t.requires_grad_() for t in inputs((6,), 8, 5))

    def curvature(function):
        (first,) = torch.autograd.grad(function(x, weight, bias).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, weight))

    for ours, theirs in zip(curvature(linear), curvature(F.linear), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_is_one_graph_under_compile():
    x, weight, bias = inputs()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(
        with_gradients(compiled, x, weight, bias), with_gradients(linear, x, weight, bias), strict=True
    ):
        assert torch.equal(ours, eager)


def test_repeats_bit_for_bit():
    given = inputs()
    for first, second in zip(with_gradients(linear, *given), with_gradients(linear, *given), strict=True):
        assert torch.equal(first, second)
