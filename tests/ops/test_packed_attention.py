import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastmim.ops import attention, packed_attention
from fastmim.ops.packed_attention import WIDTHS, attention_ref, packed_attention_ref
from tests.ops.support import LAYOUTS, assert_as_good_as_torch, backends_of, poisoned_memory

BACKENDS = backends_of("packed_attention")
KERNELS = backends_of("packed_attention", reference=False)
QUICK = backends_of("packed_attention", isas=("avx512",))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(shape, dtype=torch.float32, device="cpu", spread=1.0, seed=7):
    """qkv [B, N, 3, H, D]; queries and keys `spread` times a normal deviate."""
    generator = torch.Generator().manual_seed(seed)
    batch, tokens, heads, width = shape
    qkv = torch.randn(batch, tokens, 3, heads, width, generator=generator)
    qkv[:, :, :2] *= spread
    return qkv.to(device, dtype)


def make_bias(shape, seed=8):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_keys(batch, keys, seed=9):
    """bool [B, Nk] with at least one key in each row, all but one missing in the first."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, keys, generator=generator) < 0.6
    mask[0] = False
    mask[torch.arange(batch), torch.randint(keys, (batch,), generator=generator)] = True
    return mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 50, 3, 64), (1, 65, 2, 32)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend, shape, dtype):
    assert_as_good_as_torch(packed_attention, packed_attention_ref, make(shape, dtype), backend=backend)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 49, 64, 127, 128, 129, 197, 257])
@pytest.mark.parametrize("backend", KERNELS)
def test_any_number_of_tokens(backend, tokens):
    shape = (1, tokens, 1, 64) if backend.interpreted else (2, tokens, 3, 48)
    assert_as_good_as_torch(packed_attention, packed_attention_ref, make(shape), backend=backend)


@pytest.mark.parametrize("shape", [(1, 577, 1, 32), (1, 1025, 1, 64)], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_long_sequences(backend, shape):
    if backend.interpreted:
        shape = (1, shape[1] // 4, 1, 32)
    assert_as_good_as_torch(packed_attention, packed_attention_ref, make(shape), backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", KERNELS)
def test_any_head_width(backend, width, dtype):
    assert_as_good_as_torch(packed_attention, packed_attention_ref, make((2, 33, 1, width), dtype), backend=backend)


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("tokens", [50, 197])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_and_its_gradient(backend, tokens, per_image):
    batch, heads = (2, 1) if backend.interpreted else (3, 2)
    qkv = make((batch, tokens, heads, 32))
    bias = make_bias(((batch,) if per_image else ()) + (heads, tokens, tokens))
    assert_as_good_as_torch(packed_attention, packed_attention_ref, qkv, bias, backend=backend, wrt=(0, 1))


@pytest.mark.parametrize("bias_dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_keeps_its_dtype(backend, bias_dtype):
    qkv = make((2, 20, 2, 32), torch.bfloat16, backend.device)
    bias = make_bias((2, 20, 20)).to(backend.device, bias_dtype).requires_grad_()
    packed_attention(qkv, bias, backend=backend).square().sum().backward()
    exact = bias.detach().double().requires_grad_()
    packed_attention_ref(qkv.double(), exact).square().sum().backward()
    assert bias.grad.dtype == bias_dtype
    torch.testing.assert_close(bias.grad.double(), exact.grad, rtol=0.05, atol=0.02 * exact.grad.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_of_any_strides(backend):
    """A gathered table of relative positions comes with the heads innermost."""
    qkv = make((2, 20, 3, 32), device=backend.device)
    bias = make_bias((20, 20, 3)).to(backend.device).permute(2, 0, 1)
    expected = packed_attention(qkv, bias.contiguous(), backend=backend)
    assert torch.equal(packed_attention(qkv, bias, backend=backend), expected)
    assert torch.equal(packed_attention(qkv, bias.unsqueeze(0), backend=backend), expected)
    torch.testing.assert_close(packed_attention(qkv, bias.expand(2, 3, 20, 20), backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [17, 130])
@pytest.mark.parametrize("backend", BACKENDS)
def test_key_mask_and_log_count(backend, tokens, dtype):
    qkv = make((3, tokens, 1, 32), dtype)
    counts = torch.randint(1, 40, (3, tokens), generator=torch.Generator().manual_seed(3)).to(dtype).log()
    assert_as_good_as_torch(
        packed_attention, packed_attention_ref, qkv, None, counts, some_keys(3, tokens), backend=backend
    )


@pytest.mark.parametrize("queries, keys", [(1, 50), (7, 1), (50, 17), (12, 197), (150, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_apart_from_keys(backend, dtype, queries, keys):
    q, kv = make((2, queries, 2, 64), dtype)[:, :, 0], make((2, keys, 2, 64), dtype, seed=1)[:, :, 1:]
    bias = make_bias((2, queries, keys)).to(dtype)
    # Triton's loop takes sum(p dp) from the output, whose rounding does not cancel where one key has all the weight.
    slack = 8.0 if backend.plain == "triton" and keys > 128 else 2.0
    assert_as_good_as_torch(
        attention, attention_ref, q, kv, bias, None, some_keys(2, keys), backend=backend, wrt=(0, 1, 2), slack=slack
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout(backend, layout, dtype):
    assert_as_good_as_torch(
        packed_attention, packed_attention_ref, layout(make((2, 21, 3, 32), dtype)), backend=backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_reads_a_slice_of_the_projection_in_place(backend):
    """Heads and widths of a wider tensor, rows of a longer one: same numbers as from a copy."""
    wide = make((2, 40, 4, 96), device=backend.device)
    part = wide[:, 5:30, :, 1:3, 16:80].requires_grad_()
    copy = part.detach().contiguous().requires_grad_()
    results = [packed_attention(x, backend=backend) for x in (part, copy)]
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y, x in zip(results, (part, copy), strict=True)]
    assert torch.equal(*results)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", KERNELS)
def test_gradient_of_any_layout(backend):
    """The gradient of the output arrives expanded, transposed or with a step."""
    qkv = make((2, 18, 2, 32), device=backend.device).requires_grad_()
    for shape_it in (lambda y: y.sum(), lambda y: y.transpose(1, 3)[:, ::2].square().sum(), lambda y: y[:, 3:9].sum()):
        results = []
        for name in (backend, "reference"):
            results += torch.autograd.grad(shape_it(packed_attention(qkv, backend=name)), qkv)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [50, 197])
@pytest.mark.parametrize("backend", KERNELS)
def test_extreme_scores(backend, tokens):
    """Scores up to ten thousand: softmax takes one key or two, and nothing overflows. What each score rounded is then a
    thousandfold in the result, on either side, and the largest of few such errors is a matter of luck."""
    qkv = make((1, tokens, 1, 64), spread=50.0)
    assert_as_good_as_torch(packed_attention, packed_attention_ref, qkv, backend=backend, slack=5.0)


@pytest.mark.parametrize("logit", [1e4, -1e4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_logit_far_from_the_others(backend, logit):
    qkv = make((1, 20, 1, 32), device=backend.device)
    bias = torch.zeros(1, 20, 20, device=backend.device)
    bias[:, :, 3] = logit
    out = packed_attention(qkv, bias, backend=backend)
    keys = torch.ones(1, 20, dtype=torch.bool, device=backend.device)
    keys[:, 3] = False
    expected = qkv[:, 3:4, 2].expand_as(out) if logit > 0 else packed_attention(qkv, key_mask=keys, backend=backend)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_left_gives_its_value(backend):
    qkv = make((2, 70, 2, 32), device=backend.device).requires_grad_()
    mask = torch.zeros(2, 70, dtype=torch.bool, device=backend.device)
    mask[0, 69] = mask[1, 0] = True
    with poisoned_memory():
        out = packed_attention(qkv, key_mask=mask, backend=backend)
        (gradient,) = torch.autograd.grad(out.sum(), qkv)
    assert torch.equal(out[0], qkv[0, 69:, 2].expand_as(out[0]))
    assert torch.equal(out[1], qkv[1, :1, 2].expand_as(out[1]))
    assert (gradient[:, :, :2].abs() < 1e-4).all()
    torch.testing.assert_close(gradient[0, 69, 2], torch.full_like(gradient[0, 69, 2], 70.0))


@pytest.mark.parametrize("how", ["mask", "bias", "log_count"])
@pytest.mark.parametrize("tokens", [20, 140])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_key_left_gives_zeros(backend, tokens, how):
    qkv = make((2, tokens, 1, 32), device=backend.device).requires_grad_()
    allowed = torch.ones(2, tokens, dtype=torch.bool, device=backend.device)
    allowed[1] = False
    added = torch.zeros(2, tokens, device=backend.device).masked_fill(~allowed, float("-inf"))
    bias = None
    if how == "bias":
        bias = added[:, None, None, :].repeat(1, 1, tokens, 1).requires_grad_()
    with poisoned_memory():
        out = packed_attention(
            qkv, bias, added if how == "log_count" else None, allowed if how == "mask" else None, backend=backend
        )
        gradients = torch.autograd.grad(out.square().sum(), [qkv] if bias is None else [qkv, bias])
    assert (out[1] == 0).all()
    assert all((g[1] == 0).all() for g in gradients)
    assert torch.equal(out[0], packed_attention(qkv, backend=backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_log_count_stands_for_repeated_keys(backend):
    """One key with log n equals n copies of it, and its gradient is the sum of theirs."""
    few = make((2, 9, 2, 32), device=backend.device)
    repeats = torch.tensor([1, 4, 1, 2, 1, 1, 30, 1, 1], device=backend.device)
    which = torch.repeat_interleave(torch.arange(9, device=backend.device), repeats)
    q = few[:, :, 0].clone().requires_grad_()
    kv = few[:, :, 1:].clone().requires_grad_()
    log_count = repeats.float().log().expand(2, 9)
    collapsed = attention(q, kv, key_log_count=log_count, backend=backend)
    repeated = attention(q, kv[:, which], backend=backend)
    torch.testing.assert_close(collapsed, repeated, rtol=1e-5, atol=1e-6)
    weight = torch.randn(collapsed.shape, generator=torch.Generator().manual_seed(1)).to(backend.device)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), (q, kv)) for y in (collapsed, repeated)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_scaled_dot_product_attention(backend):
    qkv = make((2, 50, 3, 64), device=backend.device)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    for scale in (None, 0.0, 0.3):
        expected = scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
        torch.testing.assert_close(packed_attention(qkv, scale=scale, backend=backend), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_is_dense_for_the_projection(backend):
    out = packed_attention(make((2, 10, 3, 32), device=backend.device), backend=backend)
    assert out.is_contiguous()
    assert out.flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 10, 2, 32), (2, 0, 2, 32)])
def test_nothing_to_do(backend, shape):
    batch, queries, heads, width = shape
    q = torch.zeros(batch, queries, heads, width, device=backend.device, requires_grad=True)
    kv = torch.randn(batch, 10, 2, heads, width, device=backend.device, requires_grad=True)
    with poisoned_memory():
        out = attention(q, kv, backend=backend)
        gradients = torch.autograd.grad(out.sum(), (q, kv))
    assert out.shape == q.shape
    assert [g.shape for g in gradients] == [q.shape, kv.shape]
    assert (gradients[1] == 0).all()


def test_other_head_widths_are_left_to_the_reference(monkeypatch):
    monkeypatch.delenv("FASTMIM_BACKEND", raising=False)
    qkv = make((1, 5, 1, 36))
    assert torch.equal(packed_attention(qkv), packed_attention_ref(qkv))


@pytest.mark.parametrize("backend", QUICK)
def test_autocast_computes_in_its_dtype(backend):
    qkv = make((2, 20, 2, 32), device=backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        out = packed_attention(qkv, backend=backend)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, packed_attention(qkv.bfloat16(), backend=backend))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("backend", backends_of("packed_attention", reference=False, isas=("portable", "avx512")))
def test_runs_and_threads_do_not_change_a_bit(backend, with_bias):
    shape = (2, 40, 2, 32) if backend.interpreted else (7, 150, 3, 64)
    qkv = make(shape, device=backend.device).requires_grad_()
    _, tokens, heads, _ = shape
    inputs = [qkv, make_bias((heads, tokens, tokens)).to(backend.device).requires_grad_()][: 1 + with_bias]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = packed_attention(*inputs, backend=backend)
            results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_what_is_kept_is_a_number_or_two_a_row(backend):
    """The log of each row's sum of exponentials, infinity where no key is left; beside it only inputs and output.
    Triton keeps the two numbers that it is made of, because its loop goes by them: largest score and 1 / sum."""
    qkv = make((2, 20, 2, 32), device=backend.device).requires_grad_()
    mask = torch.ones(2, 20, dtype=torch.bool, device=backend.device)
    mask[1] = False
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = packed_attention(qkv, key_mask=mask, backend=backend.plain)
    known = {t.data_ptr() for t in (qkv, out, mask)}
    (lse,) = [t for t in kept if t.data_ptr() not in known]
    if backend.plain == "triton":
        lse = lse[0] - lse[1].log()
    q, k, _ = qkv.detach().unbind(2)
    expected = torch.einsum("bqhd,bkhd->bhqk", q * 32**-0.5, k).logsumexp(-1)
    torch.testing.assert_close(lse[0], expected[0])
    assert (lse[1] == float("inf")).all()


@pytest.mark.parametrize("backend", backends_of("packed_attention", reference=False, isas=("avx512",)))
def test_a_second_derivative_by_a_kernel_is_refused(backend):
    qkv = make((1, 8, 1, 32), device=backend.device).requires_grad_()
    out = packed_attention(qkv, backend=backend.plain)
    (gradient,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("backend", QUICK)
def test_compiles_without_graph_breaks(backend):
    qkv = make((2, 20, 2, 32), device=backend.device).requires_grad_()
    bias = make_bias((2, 20, 20)).to(backend.device).requires_grad_()
    keys = some_keys(2, 20).to(backend.device)
    plain = backend.plain

    def packed(x, bias):
        return packed_attention(x, bias, key_mask=keys, backend=plain)

    def apart(x, bias):
        return attention(x[:, :5, 0], x[:, :, 1:], bias[:, :5], key_mask=keys, backend=plain)

    for function in (packed, apart):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        results = [
            (f(qkv, bias), *torch.autograd.grad(f(qkv, bias).square().sum(), (qkv, bias))) for f in (compiled, function)
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", backends_of("packed_attention", reference=False, isas=("avx512",)))
def test_opcheck(backend, layout):
    qkv = layout(make((2, 6, 2, 32), device=backend.device))
    own = make_bias((2, 2, 6, 6)).to(backend.device)
    counts, mask = torch.rand(2, 6, device=backend.device), some_keys(2, 6).to(backend.device)
    for bias in (None, own, own[:1]):
        q, kv = qkv[:, :, 0].detach().requires_grad_(), qkv[:, :, 1:].detach().requires_grad_()
        bias = None if bias is None else bias.detach().requires_grad_()
        scores = (bias, counts, mask, 0.2, backend.plain)
        torch.library.opcheck(torch.ops.fastmim.packed_attention.default, (qkv.detach().requires_grad_(), *scores))
        torch.library.opcheck(torch.ops.fastmim.attention.default, (q, kv, *scores))


def test_kernels_asked_for_by_name_say_which_widths_they_take():
    with pytest.raises(ValueError, match=r"'cpu' cannot run: the kernels take head widths 32, 40, .*, this is 36"):
        packed_attention(make((1, 5, 1, 36)), backend="cpu")


def test_gradients_of_the_reference():
    qkv = make((2, 5, 2, 3), torch.float64).requires_grad_()
    shared, own = make_bias((2, 5, 5)).double().requires_grad_(), make_bias((2, 2, 5, 5)).double().requires_grad_()
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    count = torch.tensor([[1.0, 2, 3, 4, 5]] * 2, dtype=torch.float64).log()

    def function(x, bias):
        return packed_attention(x, bias, count, mask, scale=0.7)

    for bias in (shared, own):
        assert torch.autograd.gradcheck(function, (qkv, bias))
        assert torch.autograd.gradgradcheck(function, (qkv, bias))


def test_the_reference_is_the_formula():
    """Row by row, key by key, in Python floats."""
    qkv = make((1, 4, 1, 2), torch.float64)
    bias, count, mask = make_bias((1, 4, 4)).double(), [1, 3, 1, 2], [True, True, False, True]
    out = packed_attention(
        qkv, bias, torch.tensor([count]).double().log(), torch.tensor([mask]), scale=0.5, backend="reference"
    )
    (q, k, v), expected = qkv[0, :, :, 0].unbind(1), torch.zeros(4, 2, dtype=torch.float64)
    for i in range(4):
        weights = [
            count[j] * math.exp(0.5 * float(q[i] @ k[j]) + float(bias[0, i, j])) if mask[j] else 0.0 for j in range(4)
        ]
        expected[i] = sum(w / sum(weights) * v[j] for j, w in enumerate(weights))
    torch.testing.assert_close(out[0, :, 0], expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qkv": torch.zeros(2, 4, 2, 3, 32)}, r"qkv must be \[B, N, 3, H, D\], got \[2, 4, 2, 3, 32\]"),
        ({"qkv": torch.zeros(2, 4, 3, 3, 32).int()}, "must be floating point, got torch.int32"),
        ({"bias": torch.zeros(3, 4, 5)}, r"bias must be \[3, 4, 4\] or \[2, 3, 4, 4\].*got \[3, 4, 5\]"),
        ({"bias": torch.zeros(3, 4, 4).int()}, "bias must be floating point, got torch.int32"),
        ({"key_log_count": torch.zeros(2, 5)}, r"key_log_count must be \[2, 4\] \(batch, keys\), got \[2, 5\]"),
        ({"key_log_count": torch.zeros(2, 4).int()}, "key_log_count must be floating point"),
        ({"key_mask": torch.ones(2, 3, dtype=torch.bool)}, r"key_mask must be \[2, 4\] \(batch, keys\), got \[2, 3\]"),
        ({"key_mask": torch.ones(2, 4)}, "key_mask must be bool"),
        ({"backend": "fast"}, "unknown backend backend='fast'"),
    ],
)
def test_names_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(**{"qkv": make((2, 4, 3, 32))} | change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(2, 4, 96)}, r"q must be \[B, Nq, H, D\], got \[2, 4, 96\]"),
        ({"kv": torch.zeros(2, 7, 2, 3, 64)}, r"kv must be \[2, Nk, 2, 3, 32\] for q \[2, 4, 3, 32\], got"),
        (
            {"kv": torch.zeros(2, 7, 2, 3, 32).half()},
            "share dtype and device, got torch.float32 on cpu and torch.float16",
        ),
        ({"kv": torch.zeros(2, 0, 2, 3, 32)}, "at least one key"),
        ({"bias": torch.zeros(3, 4, 4)}, r"attention: bias must be \[3, 4, 7\] or \[2, 3, 4, 7\]"),
    ],
)
def test_names_what_does_not_fit_apart(change, message):
    with pytest.raises(ValueError, match=message):
        attention(**{"q": torch.zeros(2, 4, 3, 32), "kv": torch.zeros(2, 7, 2, 3, 32)} | change)
