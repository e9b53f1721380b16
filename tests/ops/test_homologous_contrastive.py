import math

import pytest
import torch

from fastmim.ops import homologous_contrastive, mixing_map
from fastmim.ops.homologous_contrastive import homologous_contrastive_ref
from tests.ops.support import LAYOUTS, assert_as_good_as_torch, backends_of, poisoned_memory

BACKENDS = backends_of("homologous_contrastive")
KERNELS = backends_of("homologous_contrastive", reference=False)
QUICK = backends_of("homologous_contrastive", isas=("avx512",))

# S, L, D, G
SHAPES = [(2, 36, 24, 4), (1, 49, 17, 3), (2, 16, 96, 8), (3, 8, 1, 2)]


def make(shape, dtype=torch.float32, device="cpu"):
    """(tokens [S, L, D], segments [S, L])."""
    sequences, length, width, group_size = shape
    tokens = torch.randn(sequences, length, width, generator=torch.Generator().manual_seed(3))
    segments = mixing_map(sequences, group_size, length, torch.tensor([1, 2, 0])).segments
    return (tokens * 3).to(device, dtype), segments.to(device)


def plain(tokens, segments, temperature):
    """Written out as the paper has it, one position after another."""
    losses = []
    for sequence, owner in zip(tokens, segments, strict=True):
        for place, token in enumerate(sequence):
            others = [j for j in range(len(owner)) if j != place]
            similarity = {j: (token @ sequence[j]) / (token.norm() * sequence[j].norm()) for j in others}
            denominator = sum((similarity[j] / temperature).exp() for j in others)
            partners = [j for j in others if owner[j] == owner[place]]
            terms = [((similarity[p] / temperature).exp() / denominator).log() for p in partners]
            losses.append(-sum(terms) / len(partners))
    return torch.stack(losses).mean()


def test_is_the_loss_of_the_paper():
    tokens, segments = make((2, 12, 5, 3), torch.float64)
    tokens.requires_grad_()
    loss, expected = homologous_contrastive(tokens, segments, 3), plain(tokens, segments, 0.25)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, tokens)[0] for x in (loss, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(backend, shape, layout, dtype):
    if backend.interpreted and (layout is not LAYOUTS[-1] or shape == SHAPES[0]):
        pytest.skip("the interpreter is slow: odd strides only")
    tokens, segments = make(shape, dtype)
    assert_as_good_as_torch(
        lambda x, backend, **o: homologous_contrastive(x, segments.to(x.device), shape[3], backend=backend, **o),
        lambda x, **o: homologous_contrastive_ref(x, segments.to(x.device), **o),
        layout(tokens), backend=backend, temperature=0.25, slack=4.0,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_angles_matter(backend):
    tokens, segments = make((1, 16, 24, 4), device=backend.device)
    lengths = torch.logspace(-3, 3, 16, device=backend.device)[None, :, None]
    values = [homologous_contrastive(t, segments, 4, backend=backend) for t in (tokens, tokens * lengths)]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.25, 0.005])
def test_extremes(backend, temperature):
    """Tokens of an image alike and images opposite: nothing is left to learn. Zero tokens are finite."""
    _, segments = make((1, 16, 4, 2), device=backend.device)
    direction = torch.tensor([1.0, 2.0, -1.0, 0.5], device=backend.device)
    tokens = torch.where(segments[..., None] == 0, direction, -direction)
    value = homologous_contrastive(tokens, segments, 2, temperature=temperature, backend=backend)
    torch.testing.assert_close(
        value.item(), math.log(7 + 8 * math.exp(-2 / temperature)), rtol=1e-5, atol=1e-6 / temperature
    )
    zeros = torch.zeros_like(tokens).requires_grad_()
    with poisoned_memory():
        value = homologous_contrastive(zeros, segments, 2, temperature=temperature, backend=backend)
        value.backward()
    torch.testing.assert_close(value.item(), math.log(15))
    assert torch.isfinite(zeros.grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_a_number_shows(backend):
    tokens, segments = make((1, 16, 24, 4), device=backend.device)
    tokens[0, 3, 5] = float("nan")
    value = homologous_contrastive(tokens.requires_grad_(), segments, 4, backend=backend)
    value.backward()
    assert value.isnan()
    assert tokens.grad.isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_with_one_position_counts_as_nothing(backend):
    tokens, _ = make((1, 8, 6, 2), device=backend.device)
    segments = torch.tensor([[0, 0, 0, 1, 0, 0, 0, 0]], device=backend.device)
    tokens.requires_grad_()
    value = homologous_contrastive(tokens, segments, 2, backend=backend)
    (gradient,) = torch.autograd.grad(value, tokens)
    kept = [0, 1, 2, 4, 5, 6, 7]
    exact = tokens.detach().double().requires_grad_()
    unit = exact / exact.norm(dim=-1, keepdim=True)
    scores = (unit @ unit.transpose(1, 2))[0] / 0.25
    total = 0
    for place in kept:
        others = [j for j in range(8) if j != place]
        partners = [j for j in kept if j != place]
        total = total + scores[place, others].logsumexp(0) - scores[place, partners].mean()
    torch.testing.assert_close(value.double(), total / 8)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(total / 8, exact)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", QUICK)
def test_is_fp32_under_autocast(backend):
    tokens, segments = make((2, 36, 24, 4), torch.bfloat16, backend.device)
    tokens.requires_grad_()
    results = []
    for enabled in (True, False):
        with torch.autocast(backend.device, torch.bfloat16, enabled=enabled):
            value = homologous_contrastive(tokens, segments, 4, backend=backend)
        assert value.dtype == torch.float32
        results.append((value, *torch.autograd.grad(value, tokens)))
    assert all(torch.equal(a, b) and torch.isfinite(a).all() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", backends_of("homologous_contrastive", reference=False, isas=("portable", "avx512")))
def test_runs_and_threads_do_not_change_a_bit(backend):
    shape = (2, 16, 20, 4) if backend.interpreted else (7, 49, 64, 4)
    tokens, segments = make(shape, device=backend.device)
    tokens.requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            value = homologous_contrastive(tokens, segments, 4, backend=backend)
            results.append((value, *torch.autograd.grad(value, tokens)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_no_sequence_is_zero(backend):
    tokens = torch.zeros(0, 16, 8, device=backend.device, requires_grad=True)
    segments = torch.zeros(0, 16, dtype=torch.int64, device=backend.device)
    value = homologous_contrastive(tokens, segments, 4, backend=backend)
    value.backward()
    assert value.item() == 0


def test_gradients_of_the_reference():
    tokens, segments = make((2, 8, 3, 2), torch.float64)
    assert torch.autograd.gradcheck(lambda x: homologous_contrastive(x, segments, 2), tokens.requires_grad_())


@pytest.mark.parametrize("backend", backends_of("homologous_contrastive", reference=False, isas=("avx512",)))
def test_a_second_derivative_by_a_kernel_is_refused(backend):
    tokens, segments = make((1, 8, 6, 2), device=backend.device)
    value = homologous_contrastive(tokens.requires_grad_(), segments, 2, backend=backend)
    (gradient,) = torch.autograd.grad(value, tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='reference'"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("backend", QUICK)
def test_compiles_without_graph_breaks(backend):
    tokens, segments = make((1, 12, 8, 3), device=backend.device)
    tokens.requires_grad_()
    plain_name = backend.plain

    def function(x):
        return homologous_contrastive(x, segments, 3, backend=plain_name)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [(f(tokens), *torch.autograd.grad(f(tokens), tokens)) for f in (compiled, function)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", backends_of("homologous_contrastive", reference=False, isas=("avx512",)))
def test_opcheck(backend, layout):
    tokens, segments = make((1, 8, 6, 2), device=backend.device)
    arguments = (layout(tokens).requires_grad_(), segments, 0.25, backend.plain)
    torch.library.opcheck(torch.ops.fastmim.homologous_contrastive.default, arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": torch.zeros(16, 8)}, r"floating point \[S, L, D\], got torch.float32 \[16, 8\]"),
        ({"tokens": torch.zeros(2, 16, 8, dtype=torch.int64)}, "floating point"),
        ({"segments": torch.zeros(2, 17, dtype=torch.int64)}, r"segments must be int64 \[2, 16\].*got.*\[2, 17\]"),
        ({"segments": torch.zeros(2, 16)}, "got torch.float32"),
        ({"group_size": 1}, "group_size is 1; two images at least"),
        ({"group_size": 9}, "16 positions for groups of 9 images; each needs two"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"tokens": torch.zeros(2, 16, 8, dtype=torch.float64), "backend": "cpu"}, "does not take torch.float64"),
    ],
)
def test_names_what_does_not_fit(change, message):
    arguments = {"tokens": torch.zeros(2, 16, 8), "segments": torch.zeros(2, 16, dtype=torch.int64), "group_size": 4}
    with pytest.raises(ValueError, match=message):
        homologous_contrastive(**arguments | change)
