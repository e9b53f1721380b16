import pytest
import torch
from torch.nn import functional as F

from fastmim.ops import decoder_input, mixing_map, unmix
from fastmim.ops.unmix import unmix_ref
from tests.ops.support import LAYOUTS, assert_as_good_as_torch, backends_of, poisoned_memory

BACKENDS = backends_of("unmix")
QUICK = backends_of("unmix", reference=False, isas=("avx512",))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# S, G, P, L, E, each place has its own token, positions, LayerNorm
CASES = [
    (3, 4, 1, 8, 64, False, True, True),
    (2, 3, 2, 7, 17, True, True, False),
    (5, 2, 1, 5, 48, True, False, True),
    (9, 4, 1, 6, 16, False, True, True),  # more images than the kernels add up at a time
    (1, 8, 0, 11, 33, False, False, False),
]


def make(sequences, size, prefix, length, width, *, own_tokens=False, dtype=torch.float32, device="cpu"):
    """(mixed, segments, mask_token, positions, norm_weight, norm_bias)"""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    segments = mixing_map(sequences, size, length, torch.tensor([1, 2, 0])).segments.to(device)
    token = normal(length, width) if own_tokens else normal(width)
    return (
        normal(sequences, prefix + length, width), segments, token, normal(prefix + length, width),
        1 + 0.1 * normal(width), normal(width),
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size, length", [(4, 8), (3, 7)])
def test_every_token_returns_to_its_image_and_place(backend, size, length):
    mixed, segments, token, *_ = make(2, size, 1, length, 5, device=backend.device)
    out = unmix(mixed, segments, size, token, num_prefix_tokens=1, backend=backend)
    assert out.shape == (2 * size, 1 + length, 5)
    for b in range(2 * size):
        assert torch.equal(out[b, 0], mixed[b // size, 0])
        for place in range(length):
            shows = segments[b // size, place] == b % size
            assert torch.equal(out[b, 1 + place], mixed[b // size, 1 + place] if shows else token)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_decoder_input_of_mae_for_the_mask_of_each_image(backend):
    mixed, segments, token, positions, weight, bias = make(2, 4, 1, 8, 16, device=backend.device)
    mixing = mixing_map(2, 4, 8, torch.tensor([1, 2, 0]))
    ids_keep, ids_restore, _ = (t.to(backend.device) for t in mixing.masks())
    group = torch.arange(8, device=backend.device)[:, None] // 4
    latent = torch.cat((mixed[:, :1].repeat_interleave(4, 0), mixed[:, 1:][group, ids_keep]), dim=1)
    norm = {"norm_weight": weight, "norm_bias": bias, "num_prefix_tokens": 1}
    expected = decoder_input(latent, token, ids_restore, positions, **norm, backend="reference")
    out = unmix(mixed, segments, 4, token, positions, **norm, backend=backend)
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(out[1], F.layer_norm(out[0], (16,), weight, bias, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend, case, layout, dtype):
    sequences, size, prefix, length, width, own_tokens, has_positions, has_norm = case
    mixed, segments, token, positions, weight, bias = make(
        sequences, size, prefix, length, width, own_tokens=own_tokens, dtype=dtype
    )
    args = [layout(mixed), segments, size, layout(token), layout(positions) if has_positions else None, prefix]
    args += [weight, bias] if has_norm else []
    wrt = [i for i in (0, 3, 4, 6, 7) if i < len(args) and args[i] is not None]
    assert_as_good_as_torch(positional, unmix_ref, *args, backend=backend, wrt=wrt)


def positional(mixed, segments, size, token, positions, prefix, weight=None, bias=None, backend=None):
    return unmix(
        mixed, segments, size, token, positions,
        num_prefix_tokens=prefix, norm_weight=weight, norm_bias=bias, backend=backend,
    )  # fmt: skip


def results(function, mixed, segments, size, token, positions, weight, bias, **options):
    """Outputs and gradients of everything."""
    inputs = [t.detach().requires_grad_() for t in (mixed, token, positions, weight, bias)]
    outputs = function(
        inputs[0], segments, size, inputs[1], inputs[2],
        num_prefix_tokens=1, norm_weight=inputs[3], norm_bias=inputs[4], **options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    return *(o.detach() for o in outputs), *torch.autograd.grad(outputs, inputs, cotangents)


def test_gradients_of_the_reference():
    mixed, segments, token, positions, *affine = make(2, 2, 1, 5, 3, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (mixed, token, positions, *affine)]
    assert torch.autograd.gradcheck(
        lambda mixed, token, positions, *affine: unmix_ref(mixed, segments, 2, token, positions, 1, *affine), inputs
    )


@pytest.mark.parametrize("backend", backends_of("unmix", reference=False, isas=("portable", "avx512")))
def test_runs_and_threads_do_not_change_a_bit(backend):
    mixed, segments, *others = make(*((1, 3, 1, 8, 32) if backend.interpreted else (6, 4, 1, 98, 160)))
    size = 3 if backend.interpreted else 4
    mixed, segments, *others = (t.to(backend.device) for t in (mixed, segments, *others))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(unmix, mixed, segments, size, *others, backend=backend))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", QUICK)
def test_a_token_that_no_image_shows_gets_no_gradient(backend):
    mixed, segments, token, *_ = make(2, 4, 1, 8, 16, device=backend.device)
    segments[1, 3] = 4  # nobody's
    with poisoned_memory():
        out = unmix(mixed.requires_grad_(), segments, 4, token, num_prefix_tokens=1, backend=backend)
        out.sum().backward()
    expected = torch.ones_like(mixed)
    expected[:, 0] = 4
    expected[1, 4] = 0
    assert torch.equal(mixed.grad, expected)


@pytest.mark.parametrize("backend", backends_of("unmix", isas=("avx512",)))
def test_compiles_without_graph_breaks(backend):
    mixed, segments, *others = make(2, 3, 1, 7, 16, device=backend.device)
    compiled = torch.compile(unmix, fullgraph=True, backend="aot_eager")
    plain = backend.plain
    for a, b in zip(
        results(compiled, mixed, segments, 3, *others, backend=plain),
        results(unmix, mixed, segments, 3, *others, backend=plain),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mixed": torch.zeros(2, 9)}, r"segments \[2, 8\] do not fit mixed \[2, 9\]"),
        ({"segments": torch.zeros(2, 9, dtype=torch.int64)}, r"segments \[2, 9\] do not fit mixed \[2, 9, 4\] with 1"),
        ({"segments": torch.zeros(2, 8)}, "segments must be int64 and group_size at least 1, got torch.float32 and 4"),
        ({"group_size": 0}, "got torch.int64 and 0"),
        ({"mask_token": torch.zeros(1, 1, 4)}, r"mask_token must be \[4\] or \[8, 4\]"),
    ],
)
def test_names_what_does_not_fit(change, message):
    mixed, segments, token, positions, *_ = make(2, 4, 1, 8, 4)
    arguments = {
        "mixed": mixed, "segments": segments, "group_size": 4, "mask_token": token, "positions": positions,
        "num_prefix_tokens": 1,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        unmix(**arguments)
