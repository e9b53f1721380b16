import pytest
import torch
from torch.nn.functional import one_hot

from fastmim.ops import packed_attention, topk_attention
from fastmim.ops.attention_operators import WIDTHS
from fastmim.ops.topk_attention import homologous_chance, topk_attention_ref
from tests.ops.support import LAYOUTS, assert_as_good_as_torch, backends_of, poisoned_memory

BACKENDS = backends_of("topk_attention")
KERNELS = backends_of("topk_attention", reference=False)
QUICK = backends_of("topk_attention", isas=("avx512",))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALE = 0.125


def make(shape, dtype=torch.float32, device="cpu", reach=3, seed=4):
    """qkv [B, N, 3, H, D]; queries and keys are small integers, so that every precision and order of summation gives
    the same scores, many of them equal: which keys are kept is then no matter of rounding."""
    generator = torch.Generator().manual_seed(seed)
    batch, tokens, heads, width = shape
    qkv = torch.randn(batch, tokens, 3, heads, width, generator=generator)
    qkv[:, :, :2] = torch.randint(-reach, reach + 1, (batch, tokens, 2, heads, width), generator=generator).float()
    qkv[:, :, 0] = qkv[:, :, 0].clamp(-1, 1)
    return qkv.to(device, dtype)


def assert_equal(*arguments, backend, **options):
    """The rule of all operations. Triton's backward pass computes weights from the log of their sum, and their mean
    gradient from the rounded output, where autograd keeps the weights: three times its error then, not two."""
    slack = 3.0 if backend.plain == "triton" else 2.0
    assert_as_good_as_torch(
        topk_attention, topk_attention_ref, *arguments, backend=backend, slack=slack, **options
    )  # fmt: skip


def weights_of(qkv, *arguments, **options):
    """The attention weights [B, H, N, N]: what comes out where the values are unit vectors."""
    tokens = qkv.shape[1]
    qkv = qkv.clone()
    qkv[:, :, 2] = torch.eye(tokens, qkv.shape[-1], device=qkv.device, dtype=qkv.dtype)[None, :, None]
    return topk_attention(qkv, *arguments, **options).transpose(1, 2)[..., :tokens]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, k, prefix", [(50, 12, 1), (33, 33, 0), (20, 1, 3), (64, 63, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend, tokens, k, prefix, dtype):
    qkv = make((2, tokens, 2, 64), dtype)
    assert_equal(qkv, k, prefix, backend=backend, scale=SCALE)


@pytest.mark.parametrize("reach", [1, 100])
@pytest.mark.parametrize("tokens, k, prefix", [(197, 49, 1), (256, 100, 0), (129, 30, 5)])
@pytest.mark.parametrize("backend", KERNELS)
def test_sizes_of_images(backend, tokens, k, prefix, reach):
    """With a reach of 1 most scores are equal to others, with 100 few are."""
    qkv = make((1, tokens, 1, 32), reach=reach)
    assert_equal(qkv, k, prefix, backend=backend, scale=0.5 / reach)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", KERNELS)
def test_any_head_width(backend, width):
    qkv = make((1, 21, 1, width), torch.bfloat16)
    assert_equal(qkv, 6, backend=backend, scale=SCALE)


@pytest.mark.parametrize("backend", KERNELS)
def test_long_sequences(backend):
    qkv = make((1, 577, 1, 32))
    assert_equal(qkv, 144, backend=backend, scale=SCALE)


def test_more_tokens_than_fit_on_a_chip_are_refused_by_triton():
    with pytest.raises(ValueError, match="'triton' cannot run: the Triton kernel takes at most 1024 tokens, these are"):
        topk_attention(make((1, 1025, 1, 32)), 10, backend="triton")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_layout(backend, layout):
    qkv = layout(make((2, 21, 3, 32)))
    assert_equal(qkv, 5, backend=backend, scale=SCALE)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("k", [1, 2, 24, 60])
@pytest.mark.parametrize("backend", BACKENDS)
def test_keeps_exactly_k_patches_and_the_prefix(backend, k, prefix):
    weights = weights_of(make((2, 70, 2, 80), device=backend.device), k, prefix, scale=0.01, backend=backend)
    kept = weights > 0
    assert (kept[:, :, prefix:, prefix:].sum(-1) == k).all()
    assert kept[:, :, :prefix].all()
    assert kept[..., :prefix].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_scores_the_first_keys_are_kept(backend):
    qkv = torch.zeros(1, 40, 3, 1, 64, device=backend.device)
    qkv[:, :, 0] = 1.0
    qkv[:, 7::10, 1] = 1.0  # keys 7, 17, 27, 37 stand out, all others are equal
    weights = weights_of(qkv, 9, 2, scale=0.01, backend=backend)[0, 0]
    expected = [0, 1, 2, 3, 4, 5, 6, 7, 17, 27, 37]  # the prefix, the outstanding, and the first five others
    for row in weights[2:]:
        assert row.nonzero().flatten().tolist() == expected
    assert (weights[:2] > 0).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tells_neighbouring_numbers_apart(backend, sign):
    """Scores that differ in the last bit, on both sides of zero and next to it."""
    values = torch.tensor([1.0, 1 + 2**-23, 1 - 2**-24, 2.0**-126, 0.0, 2.0**-100, -1.0, -(2.0**-126), 2.0])
    values = sign * values[torch.randperm(9, generator=torch.Generator().manual_seed(0))]
    qkv = torch.zeros(1, 9, 3, 1, 32)
    qkv[:, :, 0, :, 0] = 1.0
    qkv[0, :, 1, 0, 0] = values
    for k in range(1, 10):
        expected = values.topk(k).indices.sort().values.tolist()
        for row in weights_of(qkv.to(backend.device), k, 0, scale=1.0, backend=backend)[0, 0]:
            assert row.nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_patches_is_plain_attention(backend):
    shape = (1, 40, 3, 1, 64) if backend.interpreted else (2, 150, 3, 2, 64)
    qkv = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(backend.device).requires_grad_()
    results = []
    plain = "reference" if backend.plain == "triton" else backend  # its kernels for this take other tiles
    for out in (topk_attention(qkv, shape[1] - 1, backend=backend), packed_attention(qkv, backend=plain)):
        results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    for ours, expected in zip(*results, strict=True):
        if backend.plain == "triton":
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(ours, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_gives_its_value(backend):
    qkv = make((1, 30, 2, 32), device=backend.device, reach=50)
    out = topk_attention(qkv, 1, 0, backend=backend)
    q, key, value = qkv.unbind(2)
    best = torch.einsum("bqhd,bkhd->bhqk", q, key).argmax(-1)  # of equal ones the first, as ours
    expected = torch.gather(value.transpose(1, 2), 2, best.unsqueeze(-1).expand(-1, -1, -1, 32)).transpose(1, 2)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("backend", KERNELS)
def test_share_of_homologous_keys_is_the_reference_s(backend, prefix):
    qkv = make((3, 48 + prefix, 2, 32), device=backend.device)
    segments = torch.randint(4, (3, 48), generator=torch.Generator().manual_seed(6)).to(backend.device)
    with poisoned_memory():
        out, share = topk_attention(qkv, 12, prefix, segments, scale=SCALE, backend=backend)
        expected = topk_attention_ref(qkv, 12, prefix, segments, SCALE)[1]
    assert (share.dtype, share.shape) == (torch.float32, ())
    assert torch.equal(share, expected)
    assert torch.equal(out, topk_attention(qkv, 12, prefix, scale=SCALE, backend=backend))
    assert torch.equal(
        topk_attention(qkv, 12, prefix, segments.to(torch.uint8), scale=SCALE, backend=backend)[1], share
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_share_of_a_random_and_of_a_perfect_choice(backend):
    """Chance for random queries and keys; 1 where a key points at the queries of its own image; 0 at another's."""
    batch, patches = (2, 64) if backend.interpreted else (8, 196)
    generator = torch.Generator().manual_seed(1)
    places = torch.rand(batch, patches, generator=generator).argsort(dim=1)
    segments = (places % 4).to(backend.device)
    qkv = torch.randn(batch, patches + 1, 3, 2, 32, generator=generator).to(backend.device)
    share = topk_attention(qkv, patches // 4, 1, segments, backend=backend)[1].item()
    assert share == pytest.approx(homologous_chance(patches, 4), abs=0.02)
    assert homologous_chance(196, 4) == pytest.approx(0.246, abs=5e-4)
    for shift, expected in ((0, 1.0), (1, 0.0)):
        qkv[:, 1:, 0] = one_hot(segments, 32).float().unsqueeze(2)
        qkv[:, 1:, 1] = one_hot((segments + shift) % 4, 32).float().unsqueeze(2)
        assert topk_attention(qkv, patches // 4, 1, segments, backend=backend)[1].item() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_choosing_only_itself_is_no_share(backend):
    qkv = torch.zeros(1, 8, 3, 1, 32, device=backend.device)
    qkv[:, :, :2] = torch.eye(8, 32, device=backend.device)[None, :, None, None]
    _, share = topk_attention(qkv, 1, 0, torch.zeros(1, 8, dtype=torch.int64, device=backend.device), backend=backend)
    assert share.item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_are_not_kept_get_no_gradient(backend):
    qkv = make((1, 40, 1, 64), device=backend.device)
    qkv[:, :, 0] = qkv[:, :1, 0]  # all queries alike; the last ten keys point the other way
    qkv[:, 30:, 1] = -qkv[:, :1, 0]
    qkv.requires_grad_()
    (gradient,) = torch.autograd.grad(topk_attention(qkv, 10, 0, backend=backend).square().sum(), qkv)
    assert (gradient[:, 30:, 1:] == 0).all()
    assert (gradient[:, :, 1:].flatten(2).abs().sum(-1) > 0).sum() == 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_a_number_shows(backend):
    qkv = make((1, 20, 1, 32), device=backend.device)
    qkv[0, 9, 1, 0, 0] = float("nan")
    assert torch.isnan(topk_attention(qkv, 3, backend=backend)).all()


@pytest.mark.parametrize("backend", backends_of("topk_attention", reference=False, isas=("portable", "avx512")))
def test_runs_and_threads_do_not_change_a_bit(backend):
    shape = (2, 40, 2, 32) if backend.interpreted else (5, 150, 3, 64)
    qkv = torch.randn(shape[0], shape[1], 3, *shape[2:], generator=torch.Generator().manual_seed(3))
    qkv = qkv.to(backend.device).requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = topk_attention(qkv, 11, backend=backend)
            results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend):
    qkv = torch.zeros(0, 10, 3, 2, 32, device=backend.device, requires_grad=True)
    out, share = topk_attention(qkv, 3, 1, torch.zeros(0, 9, dtype=torch.int64, device=backend.device), backend=backend)
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape
    assert share.item() == 0


@pytest.mark.parametrize("backend", QUICK)
def test_autocast_computes_in_its_dtype(backend):
    qkv = make((1, 20, 2, 32), device=backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        out = topk_attention(qkv, 5, backend=backend)
    assert torch.equal(out, topk_attention(qkv.bfloat16(), 5, backend=backend))


def test_gradients_of_the_reference():
    qkv = torch.randn(2, 7, 3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: topk_attention(x, 3), qkv)
    assert torch.autograd.gradgradcheck(lambda x: topk_attention(x, 3), qkv)


@pytest.mark.parametrize("backend", backends_of("topk_attention", reference=False, isas=("avx512",)))
def test_a_second_derivative_by_a_kernel_is_refused(backend):
    qkv = make((1, 8, 1, 32), device=backend.device).requires_grad_()
    (gradient,) = torch.autograd.grad(topk_attention(qkv, 3, backend=backend).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("backend", QUICK)
def test_compiles_without_graph_breaks(backend):
    qkv = make((2, 20, 2, 32), device=backend.device).requires_grad_()
    segments = torch.arange(19, device=backend.device).remainder(3).repeat(2, 1)
    plain = backend.plain

    def function(x):
        return topk_attention(x, 5, 1, segments, backend=plain)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [(*f(qkv), *torch.autograd.grad(f(qkv)[0].square().sum(), qkv)) for f in (compiled, function)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", backends_of("topk_attention", reference=False, isas=("avx512",)))
def test_opcheck(backend, layout):
    qkv = layout(make((2, 9, 2, 32), device=backend.device)).detach().requires_grad_()
    for segments in (None, torch.arange(8, device=backend.device, dtype=torch.int32).repeat(2, 1)):
        arguments = (qkv, 3, 1, segments, SCALE, backend.plain)
        torch.library.opcheck(torch.ops.fastmim.topk_attention.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qkv": torch.zeros(2, 9, 2, 3, 32)}, r"qkv must be \[B, N, 3, H, D\], got \[2, 9, 2, 3, 32\]"),
        ({"qkv": torch.zeros(2, 9, 3, 3, 32).int()}, "must be floating point, got torch.int32"),
        ({"k": 0}, "k is 0, expected 1 to 8"),
        ({"k": 9}, r"k is 9, expected 1 to 8 \(patches among 9 tokens\)"),
        ({"num_prefix_tokens": 9}, r"num_prefix_tokens is 9, expected 0 to 8 \(N = 9\)"),
        ({"segments": torch.zeros(2, 9).int()}, r"segments must be \[2, 8\] \(batch, patches\), got \[2, 9\]"),
        ({"segments": torch.zeros(2, 8)}, "segments must be integers"),
        ({"qkv": torch.zeros(2, 9, 3, 3, 36), "backend": "cpu"}, "the kernels take head widths 32, .* this is 36"),
    ],
)
def test_names_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        topk_attention(**{"qkv": torch.zeros(2, 9, 3, 3, 32), "k": 3} | change)
