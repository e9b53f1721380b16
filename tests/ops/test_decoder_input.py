import pytest
import torch
from torch.nn import functional as F

from fastmim.ops import decoder_input, random_mask
from fastmim.ops.decoder_input import decoder_input_ref
from tests.ops.support import LAYOUTS, assert_as_good_as_torch, backends_of, poisoned_memory


def restore(visible, mask_token, ids_restore):
    """The official way: repeat, concatenate, gather. [B, K, E], [1, 1, E] -> [B, N, E]."""
    missing = ids_restore.shape[1] - visible.shape[1]
    shuffled = torch.cat((visible, mask_token.expand(visible.shape[0], missing, -1)), dim=1)
    return shuffled.gather(1, ids_restore.unsqueeze(-1).expand(-1, -1, visible.shape[-1]))


BACKENDS = backends_of("decoder_input")
KERNELS = backends_of("decoder_input", reference=False)
QUICK = backends_of("decoder_input", reference=False, isas=("avx512",))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# B, P, K, N, E, each place has its own token, positions, LayerNorm
CASES = [
    (3, 1, 5, 20, 64, False, True, True),
    (2, 0, 1, 7, 37, True, True, False),
    (3, 5, 6, 6, 16, False, False, True),  # nothing masked
    (5, 1, 3, 9, 48, True, False, True),
    (2, 5, 2, 5, 17, True, True, True),
    (1, 0, 4, 13, 96, True, False, False),
    (2, 1, 0, 6, 33, False, True, True),  # nothing visible
    (1, 1, 1, 1, 1, False, True, False),
    (35, 0, 1, 3, 16, False, True, True),  # more images than one part of a sum holds
]


def make(batch, prefix, kept, patches, width, *, own_tokens=False, dtype=torch.float32, device="cpu"):
    """(visible, mask_token, ids_restore, positions, norm_weight, norm_bias)"""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    ids_restore = torch.rand(batch, patches, generator=generator).argsort(1).to(device)
    token = normal(patches, width) if own_tokens else normal(width)
    return (
        normal(batch, prefix + kept, width), token, ids_restore, normal(prefix + patches, width),
        1 + 0.1 * normal(width), normal(width),
    )  # fmt: skip


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("kept, patches", [(49, 196), (1, 7), (6, 6)])
def test_is_the_decoder_input_of_mae(prefix, kept, patches):
    visible, token, ids_restore, positions, weight, bias = make(3, prefix, kept, patches, 12, dtype=torch.float64)
    x = restore(visible[:, prefix:], token.view(1, 1, -1), ids_restore)
    expected = torch.cat((visible[:, :prefix], x), dim=1) + positions
    sequence, normed = decoder_input(
        visible, token, ids_restore, positions, num_prefix_tokens=prefix, norm_weight=weight, norm_bias=bias
    )
    torch.testing.assert_close(sequence, expected, rtol=0, atol=0)
    torch.testing.assert_close(normed, F.layer_norm(expected, (12,), weight, bias, 1e-6))


def test_takes_the_masks_of_random_mask():
    masks = random_mask(2, 16, 4, torch.tensor([1, 2, 0]))
    visible = masks.ids_keep.unsqueeze(-1).double()  # a token that says where it belongs
    sequence = decoder_input(visible, torch.tensor([-1.0], dtype=torch.float64), masks.ids_restore)
    places = torch.arange(16.0, dtype=torch.float64).expand(2, -1)
    assert torch.equal(sequence[..., 0], places.masked_fill(masks.mask, -1))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("own_tokens", [False, True])
def test_gradients_of_the_reference(own_tokens, norm):
    visible, token, ids_restore, positions, *affine = make(2, 1, 2, 5, 3, own_tokens=own_tokens, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (visible, token, positions, *(affine if norm else ()))]

    def function(visible, token, positions, weight=None, bias=None):
        return decoder_input_ref(visible, token, ids_restore, positions, 1, weight, bias)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend, case, layout, dtype):
    batch, prefix, kept, patches, width, own_tokens, has_positions, has_norm = case
    visible, token, ids_restore, positions, weight, bias = make(
        batch, prefix, kept, patches, width, own_tokens=own_tokens, dtype=dtype
    )
    args = [layout(visible), layout(token), ids_restore, layout(positions) if has_positions else None, prefix]
    args += [weight, bias] if has_norm else []
    wrt = [i for i in (0, 1, 3, 5, 6) if i < len(args) and args[i] is not None]
    assert_as_good_as_torch(positional, decoder_input_ref, *args, backend=backend, wrt=wrt)


def positional(visible, token, ids_restore, positions, prefix, weight=None, bias=None, backend=None):
    return decoder_input(
        visible, token, ids_restore, positions,
        num_prefix_tokens=prefix, norm_weight=weight, norm_bias=bias, backend=backend,
    )  # fmt: skip


def results(function, visible, token, ids_restore, positions, weight, bias, **options):
    """Outputs and gradients of everything."""
    inputs = [t.detach().requires_grad_() for t in (visible, token, positions, weight, bias)]
    outputs = function(
        *inputs[:2], ids_restore, inputs[2], num_prefix_tokens=1, norm_weight=inputs[3], norm_bias=inputs[4], **options
    )
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    return *(o.detach() for o in outputs), *torch.autograd.grad(outputs, inputs, cotangents)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_tokens_keep_full_precision_positions(backend):
    """As under autocast: the residual is as wide as the positions, the norm is what the next linear map wants."""
    visible, *others = make(2, 1, 3, 8, 32, device=backend.device)
    visible = visible.bfloat16()
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        sequence, normed, *gradients = results(decoder_input, visible, *others, backend=backend)
    assert (sequence.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
    assert [g.dtype for g in gradients] == [torch.bfloat16] + 4 * [torch.float32]
    exact = results(decoder_input, visible.double(), *(t.double() if t.is_floating_point() else t for t in others))
    torch.testing.assert_close(sequence.double(), exact[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(normed.double(), exact[1], rtol=2**-7, atol=1e-5)  # interpreted Triton truncates
    for ours, theirs in zip(gradients, exact[2:], strict=True):
        assert (ours.double() - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_either_output_may_go_unused(backend, which):
    visible, token, ids_restore, positions, weight, bias = make(2, 1, 3, 8, 32, device=backend.device)

    def gradients(**options):
        inputs = [t.detach().requires_grad_() for t in (visible, token, positions, weight, bias)]
        affine = {"norm_weight": inputs[3], "norm_bias": inputs[4]}
        outputs = decoder_input(*inputs[:2], ids_restore, inputs[2], num_prefix_tokens=1, **affine, **options)
        with poisoned_memory():
            found = torch.autograd.grad(outputs[which].square().sum(), inputs, allow_unused=True)
        return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]

    for ours, theirs in zip(gradients(backend=backend), gradients(backend="reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_that_no_place_asks_for_get_no_gradient(backend):
    visible, token, ids_restore, *_ = make(2, 1, 4, 8, 16, device=backend.device)
    ids_restore = ids_restore.masked_fill(ids_restore == 2, 7)
    with poisoned_memory():
        visible.requires_grad_()
        decoder_input(visible, token, ids_restore, num_prefix_tokens=1, backend=backend).sum().backward()
    expected = torch.ones_like(visible)
    expected[:, 3] = 0
    assert torch.equal(visible.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_token_of_a_place_that_is_never_masked_does_not_matter(backend):
    visible, token, ids_restore, *others = make(3, 1, 4, 8, 16, own_tokens=True, device=backend.device)
    ids_restore = torch.cat((ids_restore.new_zeros(3, 1), 1 + ids_restore[:, 1:].argsort(1)), dim=1)
    token[0] = 1.0
    expected = results(decoder_input, visible, token, ids_restore, *others, backend=backend)
    token[0] = float("nan")
    found = results(decoder_input, visible, token, ids_restore, *others, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (found[3][0] == 0).all()


@pytest.mark.parametrize("own_tokens", [False, True])
@pytest.mark.parametrize("backend", backends_of("decoder_input", reference=False, isas=("portable", "avx512")))
def test_runs_and_threads_do_not_change_a_bit(backend, own_tokens):
    shape = (3, 1, 4, 10, 32) if backend.interpreted else (21, 1, 25, 100, 160)
    inputs = make(*shape, own_tokens=own_tokens, device=backend.device)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(decoder_input, *inputs, backend=backend))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_large_sequence_is_written_around_the_caches():
    """Above 8 MB the CPU kernel stores past the caches; the numbers are the same."""
    inputs = make(24, 1, 49, 196, 512)
    with poisoned_memory():
        ours = results(decoder_input, *inputs, backend="cpu")
    for a, b in zip(ours, results(decoder_input, *inputs, backend="reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", QUICK)
def test_more_than_two_to_the_31_elements_between_images(backend):
    visible, token, ids_restore, *_ = make(2, 1, 3, 8, 16, device=backend.device)
    expected = decoder_input(visible, token, ids_restore, num_prefix_tokens=1, backend=backend)
    try:
        memory = torch.empty(2**31 + visible.numel(), device=backend.device)
    except RuntimeError:
        pytest.skip("no room for 8 GB of addresses")
    far = memory.as_strided(visible.shape, (2**31, 16, 1)).copy_(visible)
    assert torch.equal(decoder_input(far, token, ids_restore, num_prefix_tokens=1, backend=backend), expected)


@pytest.mark.parametrize("backend", QUICK)
def test_an_empty_batch(backend):
    visible, token, ids_restore, positions, weight, bias = make(2, 1, 3, 8, 16, device=backend.device)
    with poisoned_memory():
        found = results(decoder_input, visible[:0], token, ids_restore[:0], positions, weight, bias, backend=backend)
    assert [list(t.shape) for t in found[:3]] == [[0, 9, 16], [0, 9, 16], [0, 4, 16]]
    assert all((t == 0).all() for t in found[3:])


def test_without_norm_no_token_is_kept_for_the_backward_pass():
    visible, token, ids_restore, positions, *_ = make(4, 1, 3, 8, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        decoder_input(
            visible.requires_grad_(), token.requires_grad_(), ids_restore, positions, num_prefix_tokens=1, backend="cpu"
        )
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in (token, ids_restore, positions)}


@pytest.mark.parametrize("backend", QUICK)
def test_a_second_derivative_by_a_kernel_is_refused(backend):
    visible, token, ids_restore, *_ = make(1, 1, 3, 8, 16, device=backend.device)
    sequence = decoder_input(visible.requires_grad_(), token, ids_restore, num_prefix_tokens=1, backend=backend)
    cotangent = torch.ones_like(sequence).requires_grad_()
    (gradient,) = torch.autograd.grad(sequence, visible, cotangent, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("backend", backends_of("decoder_input", isas=("avx512",)))
def test_compiles_without_graph_breaks(backend):
    inputs = make(2, 1, 3, 8, 16, device=backend.device)
    compiled = torch.compile(decoder_input, fullgraph=True, backend="aot_eager")
    plain = backend.plain
    for a, b in zip(
        results(compiled, *inputs, backend=plain), results(decoder_input, *inputs, backend=plain), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", QUICK)
def test_opcheck(backend, layout, norm):
    visible, token, ids_restore, positions, *affine = make(2, 1, 3, 8, 16, device=backend.device)
    visible, token, positions = (layout(t).requires_grad_() for t in (visible, token, positions))
    affine = [t.requires_grad_() for t in affine] if norm else [None, None]
    options = (1, 1, 1e-6, torch.float32, torch.float32, backend.plain)
    torch.library.opcheck(
        torch.ops.fastmim.decoder_input.default, (visible, token, ids_restore, positions, *affine, *options)
    )


def test_a_token_shown_twice_is_refused_by_the_kernel():
    visible, token, ids_restore, *_ = make(2, 1, 3, 8, 16)
    ids_restore[1] = torch.tensor([0, 3, 1, 4, 1, 2, 5, 6])
    with pytest.raises(ValueError, match="ids_restore of image 1 holds 1 twice; it must be a permutation"):
        decoder_input(visible, token, ids_restore, num_prefix_tokens=1, backend="cpu")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"visible": torch.zeros(2, 3)}, r"visible must be \[B, P \+ K, E\], got \[2, 3\]"),
        ({"num_prefix_tokens": 4}, r"4 prefix tokens do not fit visible \[2, 3, 8\]"),
        ({"ids_restore": torch.zeros(3, 6, dtype=torch.int64)}, r"must be int64 \[2, N\], got torch.int64 \[3, 6\]"),
        ({"ids_restore": torch.zeros(2, 6)}, r"must be int64 \[2, N\], got torch.float32"),
        ({"ids_restore": torch.zeros(2, 1, dtype=torch.int64)}, "2 visible patches are more than the 1 places"),
        ({"mask_token": torch.zeros(1, 1, 8)}, r"mask_token must be \[8\] or \[6, 8\].*got \[1, 1, 8\]"),
        ({"positions": torch.zeros(6, 8)}, r"must be \[7, 8\] \(1 prefix tokens and 6 patches\), got \[6, 8\]"),
        ({"norm_bias": torch.zeros(8)}, "norm_bias is given without norm_weight"),
        ({"norm_weight": torch.zeros(7)}, r"norm_weight must be \[8\].*got \[7\]"),
        ({"mask_token": torch.zeros(8, dtype=torch.int64)}, "mask_token must be floating point, got torch.int64"),
        ({"mask_token": torch.zeros(8, device="meta")}, "mask_token is on meta, ids_restore on cpu"),
    ],
)  # fmt: skip
def test_names_what_does_not_fit(change, message):
    visible, token, ids_restore, positions, *_ = make(2, 1, 2, 6, 8)
    arguments = {
        "visible": visible, "mask_token": token, "ids_restore": ids_restore, "positions": positions,
        "num_prefix_tokens": 1,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        decoder_input(**arguments)
