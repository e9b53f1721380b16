"""What only the Triton launchers promise: tests/ops/test_packed_attention.py holds them to everything else."""

import pytest
import torch

from fastmim.ops.packed_attention import WIDTHS, attention_ref

triton = pytest.importorskip("triton")
launchers = pytest.importorskip("fastmim.kernels.packed_attention")
of_bias = pytest.importorskip("fastmim.kernels.attention_bias_gradient")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def make(batch, queries, keys, heads, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    tensors = [torch.randn(batch, n, heads, width, generator=generator) for n in (queries, keys, keys, queries)]
    return [x.to(DEVICE, dtype) for x in tensors]


def run(q, k, v, grad_out, bias=None, mask=None):
    """out, dq, dk, dv, dbias through the launchers, into memory full of NaN."""
    out, dq, dk, dv = (torch.full_like(x, float("nan")) for x in (q, q, k, v))
    dbias = None if bias is None else torch.full_like(bias, float("nan"))
    softmax = torch.full((2, q.shape[0], q.shape[2], q.shape[1]), float("nan"), device=DEVICE)
    launchers.forward(q, k, v, bias, None, mask, 0.2, out, softmax)
    launchers.backward(q, k, v, out, grad_out, softmax, bias, None, mask, 0.2, dq, dk, dv)
    if bias is not None:
        of_bias.bias_gradient(q, k, v, out, grad_out, softmax, bias, None, mask, 0.2, dbias)
    return out, dq, dk, dv, dbias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("keys", [40, 70, 140])
def test_keys_that_may_not_be_attended_to_are_not_read(keys, dtype):
    q, k, v, grad_out = make(2, 33, keys, 1, 40, dtype)
    mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.5
    expected = run(q, k, v, grad_out, mask=mask)
    for x in (k, v):
        x[~mask] = float("nan")
    for got, wanted in zip(run(q, k, v, grad_out, mask=mask)[:4], expected, strict=False):
        assert torch.equal(got, wanted)
    assert (expected[2][~mask] == 0).all()
    assert (expected[3][~mask] == 0).all()


@pytest.mark.parametrize("width", [40, 96])
def test_writes_nothing_beside_its_views(width):
    """Lanes that pad a width to a power of two, and rows that pad a block, stay away from their neighbours."""
    q, k, v, grad_out = make(2, 18, 35, 2, width)
    buffers = [torch.full((2, n + 2, 4, width + 9), 7.0, device=DEVICE) for n in (18, 18, 35, 35)]
    out, dq, dk, dv = (b[:, 1:-1, 1:3, 5 : 5 + width] for b in buffers)
    softmax = torch.empty(2, 2, 2, 18, device=DEVICE)
    launchers.forward(q, k, v, None, None, None, 0.2, out, softmax)
    launchers.backward(q, k, v, out, grad_out, softmax, None, None, None, 0.2, dq, dk, dv)
    for view, wanted in zip((out, dq, dk, dv), run(q, k, v, grad_out), strict=False):
        torch.testing.assert_close(view, wanted)
        view.fill_(7.0)
    assert all((b == 7).all() for b in buffers)


def test_gradient_of_a_shared_bias_is_summed_over_parts_of_the_batch(monkeypatch):
    monkeypatch.setattr(of_bias, "_PROGRAMS", 2)  # two parts of three images and two
    q, k, v, grad_out = make(5, 16, 20, 1, 32)
    bias = torch.randn(1, 1, 16, 20, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    dbias = run(q, k, v, grad_out, bias)[4]
    exact = bias.double().requires_grad_()
    out = attention_ref(q.double(), torch.stack((k, v), 2).double(), exact, scale=0.2)
    torch.testing.assert_close(
        dbias.double(), torch.autograd.grad(out, exact, grad_out.double())[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("precise", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_what_is_launched_is_what_is_compiled_ahead_of_time(biased, precise):
    """By padded width: every choice of tiles, warps, stages and registers is one that the gate has seen."""

    def choice(kernel, width, one, blocks, warps, stages, registers, element):
        padded = triton.next_power_of_2(width)
        return kernel, padded, one, blocks["BLOCK_M"], blocks["BLOCK_N"], warps, stages, registers, element

    shipped = set()
    for c in launchers.AHEAD_OF_TIME:
        element = c.signature["q"] == "*fp32"
        tiles, constants = {n: c.constants[n] for n in ("BLOCK_M", "BLOCK_N")}, c.constants
        options = (c.num_warps, c.num_stages, c.max_registers, element)
        shipped.add(choice(c.kernel, constants["D"], constants["ONE_TILE"], tiles, *options))
    for width in WIDTHS:
        for n in (33, 50, 64, 65, 99, 128, 129, 197, 577):
            for kernel, launch in (
                (launchers._forward, launchers._forward_tiles(width, n, n, precise, biased)),
                (launchers._backward, launchers._backward_tiles(width, n, n, precise)),
            ):
                registers = launchers._registers(width, launch[0], precise, kernel is launchers._backward)
                assert choice(kernel, width, *launch, registers, precise) in shipped, (width, n, launch)
