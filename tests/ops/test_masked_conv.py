import pytest
import torch
import torch.nn.functional as F

from fastmim.ops import TileIndex, gather_tiles, masked_conv2d, upsample_mask
from fastmim.ops.masked_conv import masked_conv2d_ref
from tests.ops.support import LAYOUTS, assert_as_good_as_torch, backends_of, contiguous, poisoned_memory
from tests.ops.test_tile_index import some_ids

OPS = ["masked_depthwise", "masked_dense"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SQUARE, WIDE = (7, 7), (3, 5)

# B, grid, K, t, C, k, stride
DEPTHWISE = [
    (2, WIDE, 7, 8, 20, 7, 1),
    (2, SQUARE, 20, 4, 33, 7, 1),
    (2, SQUARE, 20, 2, 96, 7, 1),
    (2, SQUARE, 20, 1, 150, 7, 1),
    (2, WIDE, 7, 8, 48, 7, 1),
    (1, WIDE, 15, 8, 13, 5, 1),  # K = N
    (3, WIDE, 1, 4, 64, 3, 1),  # K = 1
    (3, WIDE, 7, 4, 80, 5, 1),
    (2, WIDE, 7, 2, 32, 5, 1),
    (1, WIDE, 7, 16, 17, 5, 1),
    (1, WIDE, 7, 3, 5, 7, 1),
    (2, WIDE, 7, 8, 20, 7, 2),
    (2, SQUARE, 20, 2, 40, 5, 2),
    (1, (1, 1), 1, 4, 2, 3, 2),
    (0, WIDE, 7, 4, 16, 3, 1),
]
# B, grid, K, t, C, O, k, stride
DENSE = [
    (2, WIDE, 7, 8, 20, 33, 3, 1),
    (2, SQUARE, 20, 4, 64, 70, 3, 1),
    (2, SQUARE, 20, 2, 40, 130, 3, 1),
    (2, SQUARE, 20, 1, 150, 13, 3, 1),
    (1, WIDE, 15, 4, 17, 64, 5, 1),  # K = N
    (3, WIDE, 1, 2, 16, 16, 7, 1),  # K = 1
    (1, WIDE, 7, 16, 3, 24, 7, 2),  # ResNet's stem
    (2, WIDE, 7, 8, 20, 33, 3, 2),
    (2, SQUARE, 20, 2, 33, 65, 1, 2),
    (2, SQUARE, 20, 1, 200, 250, 3, 1),  # many channels on few rows: weights are ordered and summed piece by piece
    (2, WIDE, 7, 2, 250, 210, 1, 2),
    (2, WIDE, 7, 3, 1, 6, 1, 1),
    (1, WIDE, 7, 3, 5, 6, 5, 1),
    (0, WIDE, 7, 4, 16, 8, 3, 1),
]


# Triton's interpreter takes milliseconds for every operation of every program: few taps, few rows.
INTERPRETED = {
    "masked_depthwise": [
        (2, WIDE, 7, 4, 9, 3, 1),
        (2, WIDE, 7, 2, 70, 3, 2),
        (1, WIDE, 7, 1, 5, 7, 1),
        (0, WIDE, 7, 4, 16, 3, 1),
    ],
    "masked_dense": [
        (2, WIDE, 7, 8, 20, 33, 3, 1),
        (1, WIDE, 7, 1, 70, 13, 3, 1),
        (1, WIDE, 7, 4, 3, 24, 7, 2),
        (2, WIDE, 3, 2, 16, 65, 3, 2),
        (0, WIDE, 7, 4, 16, 8, 3, 1),
    ],
}


def make(case, dtype=torch.float32, device="cpu"):
    """(x, weight, bias, tiles, stride, groups)."""
    depthwise = len(case) == 7
    batch, grid, count, side, channels, *rest = case
    out, k, stride = (channels, *rest) if depthwise else rest
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, count, side, side, channels, generator=generator)
    weight = torch.randn(out, 1 if depthwise else channels, k, k, generator=generator) / k
    bias = torch.randn(out, generator=generator)
    tiles = TileIndex.from_ids_keep(some_ids(batch, grid, count, device=device), grid)
    return *(t.to(device, dtype) for t in (x, weight, bias)), tiles, stride, channels if depthwise else 1


def params(op, **kwargs):
    """Cases of an operation with its backends."""
    cases = DEPTHWISE if op == "masked_depthwise" else DENSE
    return [
        pytest.param(*backend.values, case, id=f"{op}-{backend.id}-{'-'.join(map(str, case))}", marks=backend.marks)
        for backend in backends_of(op, **kwargs)
        for case in (INTERPRETED[op] if backend.values[0].interpreted else cases)
    ]


EVERY = [*params(OPS[0]), *params(OPS[1])]
BEST = [*params(OPS[0], isas=("avx512",)), *params(OPS[1], isas=("avx512",))]
KERNELS = [*params(OPS[0], reference=False, isas=("avx512",)), *params(OPS[1], reference=False, isas=("avx512",))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend, case", EVERY)
def test_equals_reference(backend, case, dtype):
    x, weight, bias, *options = make(case, dtype, backend.device)
    assert_as_good_as_torch(masked_conv2d, masked_conv2d_ref, x, weight, bias, *options, backend=backend, wrt=(0, 1, 2))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("backend, case", [p for op in OPS for p in params(op, isas=("avx512",))[:2]])
def test_any_layout(backend, case, layout):
    x, weight, bias, tiles, *options = make(case, device=backend.device)
    results = []
    for place in (contiguous, layout):
        arguments = [place(t).detach().requires_grad_() for t in (x, weight, bias)]
        y = masked_conv2d(*arguments, tiles, *options, backend=backend)
        results.append((y, *torch.autograd.grad(y.square().sum(), arguments)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend, case", [p for p in BEST if p.values[1][0]])
def test_is_the_dense_convolution_of_the_masked_map(backend, case):
    """In whole numbers, where fp32 is exact: forward and all gradients equal those of the dense convolution of a map
    whose masked cells are zero, times the mask, to the bit."""
    x, weight, bias, tiles, stride, groups = make(case, device=backend.device)
    batch, side, (gh, gw) = case[0], case[3], tiles.grid
    weight, bias = ((t * 4).round().requires_grad_() for t in (weight, bias))
    generator = torch.Generator().manual_seed(4)
    size = gh * side, gw * side
    image = torch.randint(-3, 4, (batch, x.shape[4], *size), generator=generator).float().to(x.device).requires_grad_()
    mask = tiles.slots < 0
    dense = F.conv2d(image * ~upsample_mask(mask, tiles.grid, size).unsqueeze(1), weight, bias, stride,
                     weight.shape[-1] // 2, groups=groups)  # fmt: skip
    expected = dense * ~upsample_mask(mask, tiles.grid, dense.shape[2:]).unsqueeze(1)
    cotangent = torch.randint(-2, 3, expected.shape, generator=generator).float().to(x.device)
    wanted = (image, weight, bias)
    truth = torch.autograd.grad(expected, wanted, cotangent)
    y = masked_conv2d(gather_tiles(image, tiles), weight, bias, tiles, stride, groups, backend=backend)
    assert torch.equal(y, gather_tiles(expected, tiles))
    ours = torch.autograd.grad(y, wanted, gather_tiles(cotangent, tiles))
    for name, a, b in zip(("image", "weight", "bias"), ours, truth, strict=True):
        assert torch.equal(a, b), f"gradient of {name}"


@pytest.mark.parametrize("backend, case", BEST)
def test_masked_pixels_do_not_matter(backend, case):
    _, weight, bias, tiles, stride, groups = make(case, device=backend.device)
    size = tiles.grid[0] * case[3], tiles.grid[1] * case[3]
    image = torch.randn(case[0], case[4], *size, device=backend.device)
    other = image.masked_fill(upsample_mask(tiles.slots < 0, tiles.grid, size).unsqueeze(1), float("nan"))
    a, b = (
        masked_conv2d(gather_tiles(i, tiles), weight, bias, tiles, stride, groups, backend=backend)
        for i in (image, other)
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("backend, case", KERNELS)
def test_permuting_the_visible_cells_permutes_the_rows(backend, case):
    x, weight, bias, tiles, stride, groups = make(case, device=backend.device)
    order = torch.randperm(tiles.count, generator=torch.Generator().manual_seed(2)).to(x.device)
    moved = TileIndex.from_ids_keep(tiles.ids_keep[:, order], tiles.grid)
    a = masked_conv2d(x, weight, bias, tiles, stride, groups, backend=backend)
    b = masked_conv2d(x[:, order], weight, bias, moved, stride, groups, backend=backend)
    if backend.interpreted and groups == 1:  # products are then the host's, which rounds by place
        torch.testing.assert_close(a[:, order], b)
    else:
        assert torch.equal(a[:, order], b)


@pytest.mark.parametrize(
    "backend, case",
    [p for op in OPS for p in params(op, reference=False, isas=("portable", "avx512")) if p.values[0].plain == "cpu"],
)
def test_threads_do_not_change_a_bit(backend, case):
    x, weight, bias, tiles, *options = make((9, *case[1:]) if case[0] else case)
    wanted = [t.requires_grad_() for t in (x, weight, bias)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = masked_conv2d(x, weight, bias, tiles, *options, backend=backend)
            results.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend, case", [p for p in KERNELS if not p.values[0].interpreted or p.values[1][-1] == 2])
def test_only_the_gradients_asked_for(backend, case):
    x, weight, bias, tiles, *options = make(case, device=backend.device)
    wanted = [t.requires_grad_() for t in (x, weight, bias)]
    with poisoned_memory():
        whole = masked_conv2d(*wanted, tiles, *options, backend=backend).square().sum()
        expected = torch.autograd.grad(whole, wanted)
        for i, one in enumerate(wanted):
            arguments = [t if t is one else t.detach() for t in wanted]
            alone = masked_conv2d(*arguments, tiles, *options, backend=backend).square().sum()
            assert torch.equal(torch.autograd.grad(alone, one)[0], expected[i])
        without = masked_conv2d(x, weight, None, tiles, *options, backend=backend)
    torch.testing.assert_close(without + bias, masked_conv2d(x, weight, bias, tiles, *options, backend=backend))


@pytest.mark.parametrize("backend, case", [p for op in OPS for p in params(op, reference=False, isas=("avx512",))[:3]])
def test_a_weight_may_be_more_precise_than_x(backend, case):
    """As under autocast: features in bf16, parameters in fp32; gradients come in the dtype of what they belong to."""
    x, weight, bias, tiles, *options = make(case, device=backend.device)
    wanted = [x.bfloat16().requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    y = masked_conv2d(*wanted, tiles, *options, backend=backend)
    exact = [t.detach().double().requires_grad_() for t in wanted]
    truth = masked_conv2d_ref(*exact, tiles, *options)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), truth, rtol=2**-8, atol=1e-6)
    cotangent = torch.randn(y.shape, device=y.device).bfloat16()
    ours = torch.autograd.grad(y, wanted, cotangent)
    for a, b, t in zip(ours, torch.autograd.grad(truth, exact, cotangent.double()), wanted, strict=True):
        assert a.dtype == t.dtype
        torch.testing.assert_close(a.double(), b, rtol=2**-8 if t is wanted[0] else 1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autocast_is_that_of_conv2d(backend):
    x, weight, bias, *options = make(DENSE[0])
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_conv2d(x, weight, bias, *options, backend=backend)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), masked_conv2d_ref(x, weight, bias, *options), rtol=2e-2, atol=0.2)


@pytest.mark.parametrize(
    "case", [(2, (2, 3), 3, 2, 2, 3, 1), (1, (2, 3), 3, 2, 2, 7, 2), (2, (2, 2), 3, 2, 3, 2, 3, 2)]
)
def test_gradients_of_the_reference(case):
    x, weight, bias, tiles, stride, groups = make(case, torch.float64)
    arguments = [t.requires_grad_() for t in (x, weight, bias)]

    def function(*arguments):
        return masked_conv2d(*arguments, tiles, stride, groups)

    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("backend, case", [p for op in OPS for p in params(op, isas=("avx512",))[:1]])
def test_compiles_without_graph_breaks(backend, case):
    x, weight, bias, tiles, stride, groups = make(case, device=backend.device)
    wanted, plain = [t.requires_grad_() for t in (x, weight, bias)], backend.plain

    def function(*arguments):
        index = TileIndex.from_ids_keep(tiles.ids_keep, tiles.grid)
        return masked_conv2d(*arguments, index, stride, groups, backend=plain)

    results = []
    for f in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        y = f(*wanted)
        results.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend, case", [p for op in OPS for p in params(op, reference=False, isas=("avx512",))[:1]])
def test_opcheck(backend, case, layout):
    x, weight, bias, tiles, stride, groups = make(case, device=backend.device)
    x, name, last = layout(x), OPS[groups == 1], (tiles.neighbours, stride)
    gradient = torch.randn_like(masked_conv2d(x, weight, bias, tiles, stride, groups, backend="reference"))
    ops = torch.ops.fastmim
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(getattr(ops, name).default, (*leaves, *last, backend.plain))
    arguments = (layout(gradient), weight, *last, backend.plain)
    torch.library.opcheck(getattr(ops, f"{name}_input_gradient").default, arguments)
    for with_bias in (False, True):
        arguments = (layout(gradient), x, weight, *last, with_bias, backend.plain)
        torch.library.opcheck(getattr(ops, f"{name}_weight_gradient").default, arguments)
        torch.library.opcheck(getattr(ops, f"{name}_gradients").default, arguments)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("backend, case", [p for op in OPS for p in params(op, reference=False, isas=("avx512",))[:1]])
def test_operator_equals_direct_call(backend, case, wanted):
    """The public function goes around the dispatcher unless somebody looks; and whichever gradients are asked for, a
    kernel that computes several in one pass gives the same."""
    x, weight, bias, tiles, stride, groups = make(case, device=backend.device)
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate((x, weight, bias))]
    operator = getattr(torch.ops.fastmim, OPS[groups == 1])
    results = []
    for y in (
        masked_conv2d(*leaves, tiles, stride, groups, backend=backend.plain),
        operator(*leaves, tiles.neighbours, stride, backend.plain),
    ):
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaves[i] for i in wanted])))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend, case", [p for op in OPS for p in params(op, reference=False, isas=("avx512",))[:1]])
def test_second_derivatives_of_kernels_are_refused(backend, case):
    x, weight, bias, tiles, stride, groups = make(case, device=backend.device)
    y = masked_conv2d(x.requires_grad_(), weight, bias, tiles, stride, groups, backend=backend.plain)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 5, 8, 8, 20)}, r"tiles \[2, 7, t, t, C\] as the index has them, got \[2, 5, 8, 8, 20\]"),
        ({"x": torch.zeros(2, 7, 8, 8, 21)}, "weight expects 20 input channels, x has 21"),
        ({"x": torch.zeros(2, 7, 8, 8, 20, dtype=torch.int32)}, "x must be floating point, got torch.int32"),
        ({"x": torch.zeros(2, 7, 8, 8, 20).double(), "backend": "cpu"}, "does not take torch.float64"),
        ({"weight": torch.zeros(33, 20, 3)}, r"weight must be \[O, C / groups, k, k\], got \[33, 20, 3\]"),
        ({"weight": torch.zeros(33, 20, 2, 2)}, "a 2 x 2 kernel is not supported with groups=1"),
        ({"weight": torch.zeros(20, 1, 9, 9), "bias": None, "groups": 20}, "a 9 x 9 kernel is not supported"),
        ({"bias": torch.zeros(20)}, r"bias is \[20\], weight has 33 output channels"),
        ({"groups": 2}, r"groups is 2; it must be 1, or equal to the input channels \(20\)"),
        ({"stride": 3}, "stride is 3 with tiles of 8 x 8"),
        ({"x": torch.zeros(2, 7, 1, 1, 20), "stride": 2}, "stride is 2 with tiles of 1 x 1"),
        ({"backend": "fast"}, "unknown backend"),
    ],
)
def test_names_what_does_not_fit(change, message):
    x, weight, bias, tiles, stride, groups = make(DENSE[0])
    arguments = {"x": x, "weight": weight, "bias": bias, "tiles": tiles, "stride": stride, "groups": groups}
    with pytest.raises(ValueError, match=message):
        masked_conv2d(**(arguments | change))
