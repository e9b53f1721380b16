import pytest
import torch
import torch.nn.functional as F

from fastmim.ops import TileIndex, gather_tiles, masked_avg_pool2d, masked_max_pool2d, scatter_tiles, upsample_mask
from fastmim.ops.masked_pool import masked_avg_pool2d_ref, masked_max_pool2d_ref
from tests.ops.support import LAYOUTS, assert_as_good_as_torch, backends_of
from tests.ops.test_tile_index import some_ids

# B, grid, K, t, C
CASES = [(2, (3, 5), 7, 8, 5), (3, (4, 2), 8, 2, 3), (1, (1, 1), 1, 4, 1), (2, (2, 3), 1, 4, 13), (0, (2, 2), 1, 2, 3)]
WINDOWS = [(3, 2, 1), (2, 2, 0), (2, None, 0), (3, 1, 1)]  # kernel, stride, padding
KERNELS = backends_of("masked_max_pool2d", reference=False)


def make(case, dtype=torch.float32):
    """(x, tiles, the map with zeros at masked positions, visible [B, 1, H, W])."""
    batch, grid, count, side, channels = case
    tiles = TileIndex.from_ids_keep(some_ids(batch, grid, count), grid)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(batch, count, side, side, channels, generator=generator).to(dtype)
    seen = ~upsample_mask(tiles.slots < 0, grid, (grid[0] * side, grid[1] * side)).unsqueeze(1)
    return x, tiles, scatter_tiles(x, tiles), seen


def windows_of(dense, seen, kernel, stride, padding):
    """Every window's values and whether they are visible, written out: [B, C, h, w, k * k] each."""

    def unfold(t, fill):
        t = F.pad(t, (padding,) * 4, value=fill).unfold(2, kernel, stride or kernel).unfold(3, kernel, stride or kernel)
        return t.flatten(4)

    return unfold(dense, 0), unfold(seen.expand_as(dense), False)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_max_is_that_of_the_visible_values(case, window):
    x, tiles, dense, seen = make(case)
    y = masked_max_pool2d(x - 5, tiles, *window)  # all negative: a masked zero would win
    side = case[3] // (window[1] or window[0])
    assert y.shape == (*x.shape[:2], side, side, case[4])
    values, visible = windows_of(dense - 5, seen, *window)
    if case[0]:
        assert torch.equal(y, gather_tiles(values.masked_fill(~visible, float("-inf")).amax(-1), tiles))


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_max_after_relu_is_that_of_spark(case):
    x, tiles, dense, _ = make(case)
    spark = gather_tiles(F.max_pool2d(dense.relu(), 3, 2, 1), tiles)
    assert torch.equal(masked_max_pool2d(x.relu(), tiles, 3, 2, 1), spark)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_average_is_the_mean_of_the_visible_values(case, window):
    x, tiles, dense, seen = make(case, torch.float64)
    values, visible = windows_of(dense, seen, *window)
    mean = gather_tiles((values * visible).sum(-1) / visible.sum(-1).clamp(min=1), tiles)
    torch.testing.assert_close(masked_avg_pool2d(x, tiles, *window), mean)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_average_over_the_window_is_that_of_spark(case, window):
    x, tiles, dense, _ = make(case)
    y = masked_avg_pool2d(x, tiles, *window, count="window")
    torch.testing.assert_close(y, gather_tiles(F.avg_pool2d(dense, *window), tiles))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_all_visible_is_plain_pooling(window):
    x, tiles, dense, _ = make((2, (2, 3), 6, 4, 3))
    kernel, stride, padding = window
    expected = F.avg_pool2d(dense, kernel, stride, padding, count_include_pad=False)
    torch.testing.assert_close(scatter_tiles(masked_avg_pool2d(x, tiles, *window), tiles), expected)
    pooled = scatter_tiles(masked_max_pool2d(x, tiles, *window), tiles)
    assert torch.equal(pooled, F.max_pool2d(dense, kernel, stride, padding))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    x, tiles, *_ = make(CASES[0], dtype)
    for count in ("visible", "window"):
        y = masked_avg_pool2d(x, tiles, 3, 2, 1, count=count)
        assert y.dtype == dtype
        assert torch.equal(y, masked_avg_pool2d(x.float(), tiles, 3, 2, 1, count=count).to(dtype))
    assert masked_max_pool2d(x, tiles, 3, 2, 1).dtype == dtype


@pytest.mark.parametrize("window", WINDOWS[:2], ids=str)
def test_gradients(window):
    x, tiles, *_ = make((2, (2, 3), 3, 4, 2), torch.float64)
    x = x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: masked_max_pool2d(x, tiles, *window), x)
    for count in ("visible", "window"):
        assert torch.autograd.gradcheck(lambda x, c=count: masked_avg_pool2d(x, tiles, *window, count=c), x)


def test_compiles_without_graph_breaks():
    x, tiles, *_ = make(CASES[0])

    def function(x):
        return masked_max_pool2d(x, tiles, 3, 2, 1) + masked_avg_pool2d(x, tiles, 2)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))


@pytest.mark.parametrize("pool", [masked_max_pool2d, masked_avg_pool2d])
@pytest.mark.parametrize(
    "window, message",
    [
        ((2, 3, 0), "do not turn tiles of 8 x 8 into whole tiles"),
        ((3, 2, 0), "windows of 3 with stride 2 and padding 0 do not turn tiles of 8 x 8"),
        ((2, 2, 2), "padding 2 are no pooling window"),
        ((0, 1, 0), "kernel_size 0"),
    ],
)
def test_names_what_does_not_fit(pool, window, message):
    x, tiles, *_ = make(CASES[0])
    with pytest.raises(ValueError, match=message):
        pool(x, tiles, *window)
    with pytest.raises(ValueError, match="one of visible, window, got 'all'"):
        masked_avg_pool2d(x, tiles, 2, count="all")


# The last three reach several cells, cover a tile with one window, and step over positions.
KERNEL_WINDOWS = [((3, 2, 1), 4), ((2, 2, 0), 2), ((3, 1, 1), 1), ((5, 1, 2), 2), ((7, 1, 3), 1), ((5, 4, 1), 4),
                  ((1, 2, 0), 2)]  # fmt: skip


def on(device, tiles):
    return TileIndex.from_ids_keep(tiles.ids_keep.to(device), tiles.grid)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window, side", KERNEL_WINDOWS, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_equal_the_reference(backend, window, side, layout):
    cases = [(2, (3, 5), 7, side, 83), (2, (1, 2), 1, side, 5), (2, (3, 3), 9, side, 16)]
    for case in [(1, (1, 2), 1, side, 70), (1, (2, 2), 3, side, 2)] if backend.interpreted else cases:
        x, tiles, *_ = make(case)
        tiles = on(backend.device, tiles)
        x = layout(x - 1)
        assert_as_good_as_torch(masked_max_pool2d, masked_max_pool2d_ref, x, tiles, *window, backend=backend)
        for count_of in ("visible", "window"):
            assert_as_good_as_torch(
                masked_avg_pool2d, masked_avg_pool2d_ref, x, tiles, *window, backend=backend, count=count_of
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_in_half_precision(backend, dtype):
    x, tiles, *_ = make((1, (2, 3), 3, 2, 70), dtype)
    tiles, x = on(backend.device, tiles), x.to(backend.device)
    assert torch.equal(masked_max_pool2d(x, tiles, 3, 2, 1, backend=backend), masked_max_pool2d_ref(x, tiles, 3, 2, 1))
    slack = 4.0 if backend.interpreted and dtype == torch.bfloat16 else 2.0  # the interpreter's stores truncate
    assert_as_good_as_torch(masked_avg_pool2d, masked_avg_pool2d_ref, x, tiles, 3, 2, 1, backend=backend, slack=slack)
    assert_as_good_as_torch(masked_max_pool2d, masked_max_pool2d_ref, x, tiles, 3, 2, 1, backend=backend, slack=slack)


@pytest.mark.parametrize("backend", KERNELS)
def test_one_position_gets_the_gradient_of_a_window(backend):
    """Ties go to the first, as in torch; a NaN wins, and so does minus infinity where there is nothing else."""
    x, tiles, *_ = make((1, (1, 2), 1, 4, 20))
    tiles = on(backend.device, tiles)
    for value in (3.0, float("-inf")):
        same = torch.full_like(x, value, device=backend.device).requires_grad_()
        y = masked_max_pool2d(same, tiles, 2, 2, backend=backend)
        assert torch.equal(y, torch.full_like(y, value))
        first = torch.zeros_like(same)
        first[:, :, ::2, ::2] = 1
        assert torch.equal(torch.autograd.grad(y.sum(), same)[0], first)
    holed = x.clone().to(backend.device)
    holed[0, 0, 1, 2, 3] = float("nan")
    pooled = masked_max_pool2d(holed, tiles, 3, 2, 1, backend=backend)
    assert torch.equal(pooled.isnan(), masked_max_pool2d_ref(holed, tiles, 3, 2, 1).isnan())


@pytest.mark.parametrize("backend", KERNELS)
def test_masked_positions_get_nothing_and_give_nothing(backend):
    """The tiles of one image do not change those of another, and an empty batch stays empty."""
    x, tiles, *_ = make((2, (2, 3), 3, 4, 5))
    tiles, x = on(backend.device, tiles), x.to(backend.device)
    other = torch.cat([x[:1], torch.randn_like(x[1:])])
    for pool in (masked_max_pool2d, masked_avg_pool2d):
        a, b = (pool(t, tiles, 3, 1, 1, backend=backend) for t in (x, other))
        assert torch.equal(a[0], b[0])
        assert not torch.equal(a[1], b[1])
        none = on(backend.device, make(CASES[4])[1])
        assert pool(x.new_zeros((0, 1, 2, 2, 3)), none, 2, backend=backend).shape == (0, 1, 1, 1, 3)


@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_are_deterministic(backend):
    x, tiles, *_ = make((1, (1, 3), 2, 2, 5) if backend.interpreted else (3, (3, 4), 6, 4, 40))
    tiles, x = on(backend.device, tiles), x.to(backend.device).requires_grad_()
    for pool in (masked_max_pool2d, masked_avg_pool2d):
        runs = []
        for _ in range(2):
            y = pool(x, tiles, 3, 1, 1, backend=backend)
            runs.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend):
    x, tiles, *_ = make((1, (1, 2), 1, 2, 3))
    neighbours, x = tiles.neighbours.to(backend.device), x.to(backend.device).requires_grad_()
    ops, name = torch.ops.fastmim, backend.plain
    torch.library.opcheck(ops.masked_max_pool.default, (x, neighbours, 2, 2, 0, name))
    torch.library.opcheck(ops.masked_avg_pool.default, (x, neighbours, 2, 2, 0, True, name))
    out, chosen = ops.masked_max_pool(x.detach(), neighbours, 2, 2, 0, name)
    torch.library.opcheck(ops.masked_max_pool_backward.default, (out, chosen, neighbours, 2, 2, 0, name))
    out, share = ops.masked_avg_pool(x.detach(), neighbours, 2, 2, 0, True, name)
    torch.library.opcheck(ops.masked_avg_pool_backward.default, (out, share, neighbours, 2, 2, 0, name))


@pytest.mark.parametrize("backend", KERNELS)
def test_windows_beyond_the_table_are_the_references(backend):
    x, tiles, *_ = make((2, (9, 9), 40, 1, 3))
    tiles, x = on(backend.device, tiles), x.to(backend.device)
    assert torch.equal(masked_max_pool2d(x, tiles, 9, 1, 4), masked_max_pool2d_ref(x, tiles, 9, 1, 4))
    with pytest.raises(ValueError, match="windows of 9 with padding 4 are too large for tiles of 1 x 1"):
        masked_max_pool2d(x, tiles, 9, 1, 4, backend=backend.plain)
