import pytest
import torch

from fastmim.ops import TileIndex, gather_tiles, scatter_tiles, upsample_mask
from tests.ops.support import LAYOUTS, backends_of, poisoned_memory
from tests.ops.test_tile_index import some_ids

# B, (gh, gw), K, t, C
CASES = [(2, (3, 5), 4, 8, 3), (3, (4, 2), 8, 1, 7), (1, (1, 1), 1, 2, 1), (2, (2, 3), 1, 4, 13), (0, (2, 2), 1, 2, 3)]


def make(batch, grid, count, side, channels, dtype=torch.float32):
    tiles = TileIndex.from_ids_keep(some_ids(batch, grid, count), grid)
    generator = torch.Generator().manual_seed(1)
    return tiles, torch.randn(batch, channels, grid[0] * side, grid[1] * side, generator=generator).to(dtype)


def visible(tiles, side):
    """[B, 1, H, W] bool."""
    size = tiles.grid[0] * side, tiles.grid[1] * side
    return ~upsample_mask(tiles.slots < 0, tiles.grid, size).unsqueeze(1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather_takes_the_cells_in_order(case, layout):
    tiles, dense = make(*case)
    (_, gw), side = tiles.grid, case[3]
    x = gather_tiles(layout(dense), tiles)
    assert x.is_contiguous()
    assert x.shape == (case[0], case[2], side, side, case[4])
    for b, cells in enumerate(tiles.ids_keep.tolist()):
        for k, cell in enumerate(cells):
            row, column = cell // gw * side, cell % gw * side
            assert torch.equal(x[b, k], dense[b, :, row : row + side, column : column + side].permute(1, 2, 0))


@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scatter_puts_them_back_and_fills_the_rest(case, token):
    tiles, dense = make(*case)
    fill = torch.arange(1.0, case[4] + 1) if token else None
    back = scatter_tiles(gather_tiles(dense, tiles), tiles, fill)
    rest = fill.reshape(1, -1, 1, 1) if token else 0.0
    assert torch.equal(back, torch.where(visible(tiles, case[3]), dense, rest))
    assert back.is_contiguous(memory_format=torch.channels_last)


def test_dtypes_are_kept():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        tiles, dense = make(*CASES[0], dtype=dtype)
        x = gather_tiles(dense, tiles)
        assert x.dtype == scatter_tiles(x, tiles, torch.zeros(3)).dtype == dtype
    tiles, dense = make(*CASES[0])
    assert gather_tiles((dense * 9).to(torch.uint8), tiles).dtype == torch.uint8


def test_masked_cells_are_not_read_and_get_no_gradient():
    tiles, dense = make(2, (3, 4), 5, 2, 3)
    dense = dense.masked_fill(~visible(tiles, 2), float("nan")).requires_grad_()
    x = gather_tiles(dense, tiles)
    assert torch.isfinite(x).all()
    x.square().sum().backward()
    assert torch.equal(dense.grad, torch.where(visible(tiles, 2), 2 * dense.detach(), 0.0))


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_gradients(case):
    tiles, dense = make(*case, dtype=torch.float64)
    x = gather_tiles(dense, tiles).requires_grad_()
    fill = torch.randn(case[4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: gather_tiles(d, tiles), dense.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, f: scatter_tiles(x, tiles, f), (x, fill))
    assert torch.autograd.gradgradcheck(lambda x, f: scatter_tiles(x, tiles, f), (x, fill))


def test_compiles_without_graph_breaks():
    tiles, dense = make(2, (3, 4), 5, 2, 3)
    fill = torch.randn(3, requires_grad=True)

    def function(dense, fill):
        return scatter_tiles(gather_tiles(dense, tiles) * 2, tiles, fill)

    results = []
    for f in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        out = f(dense.requires_grad_(), fill)
        results.append((out, *torch.autograd.grad(out.square().sum(), (dense, fill))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_names_what_does_not_fit():
    tiles, dense = make(2, (3, 5), 4, 8, 3)
    x = gather_tiles(dense, tiles)
    with pytest.raises(ValueError, match=r"expected a map \[2, C, H, W\], got \[1, 3, 24, 40\]"):
        gather_tiles(dense[:1], tiles)
    with pytest.raises(ValueError, match="24 x 45 is not a 3 x 5 grid of square cells"):
        gather_tiles(torch.zeros(2, 3, 24, 45), tiles)
    with pytest.raises(ValueError, match=r"tiles \[2, 4, t, t, C\] as the index has them, got \[2, 3, 8, 8, 3\]"):
        scatter_tiles(x[:, 1:], tiles)
    with pytest.raises(ValueError, match=r"fill must be \[3\], as x has channels, got \[4\]"):
        scatter_tiles(x, tiles, torch.zeros(4))


@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", backends_of("gather_tiles", reference=False))
def test_kernels_equal_the_reference(backend, case, layout, token):
    """To the bit; the token's gradient, a sum in another order, to rounding."""
    tiles, dense = make(*case)
    tiles = TileIndex.from_ids_keep(tiles.ids_keep.to(backend.device), tiles.grid)
    dense, results = layout(dense.to(backend.device)), []
    fill = torch.randn(case[4], generator=torch.Generator().manual_seed(2)).to(dense)
    for name in (backend, "reference"):
        wanted = [t.detach().requires_grad_() for t in (dense, fill)]
        with poisoned_memory():
            x = gather_tiles(wanted[0], tiles, backend=name)
            y = scatter_tiles(x.square(), tiles, wanted[1] if token else None, backend=name)
            cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
            results.append((x, y, *torch.autograd.grad(y, wanted[: 1 + token], layout(cotangent))))
        assert y.is_contiguous(memory_format=torch.channels_last)
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        if i < 3:
            assert torch.equal(a, b), i
        else:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", backends_of("gather_tiles", reference=False))
def test_kernels_move_any_dtype(backend, dtype):
    tiles, dense = make(*CASES[0])
    tiles, dense = TileIndex.from_ids_keep(tiles.ids_keep.to(backend.device), tiles.grid), dense.to(backend.device)
    assert torch.equal(gather_tiles((dense.abs() * 50).to(dtype), tiles, backend=backend),
                       gather_tiles((dense.abs() * 50).to(dtype), tiles, backend="reference"))  # fmt: skip


@pytest.mark.parametrize("backend", backends_of("gather_tiles", reference=False))
def test_kernels_can_be_differentiated_twice(backend):
    tiles, dense = make(1, (1, 2), 1, 1, 2, dtype=torch.float64)
    tiles = TileIndex.from_ids_keep(tiles.ids_keep.to(backend.device), tiles.grid)
    dense, fill = (t.to(backend.device).requires_grad_() for t in (dense, torch.randn(2, dtype=torch.float64)))

    def function(dense, fill):
        return scatter_tiles(gather_tiles(dense, tiles, backend=backend) ** 2, tiles, fill**2, backend=backend)

    assert torch.autograd.gradcheck(function, (dense, fill))
    assert torch.autograd.gradgradcheck(function, (dense, fill))


@pytest.mark.parametrize("backend", backends_of("gather_tiles", reference=False))
def test_opcheck(backend):
    tiles, dense = make(2, (1, 2), 1, 2, 3)
    index = (tiles.ids_keep.to(backend.device), tiles.slots.to(backend.device), *tiles.grid, backend.plain)
    x, fill = gather_tiles(dense, tiles).to(backend.device), torch.randn(3, device=backend.device)
    ops, dense = torch.ops.fastmim, dense.to(backend.device).requires_grad_()
    torch.library.opcheck(ops.gather_tiles.default, (dense, *index))
    torch.library.opcheck(ops.scatter_tiles.default, (x.requires_grad_(), fill.requires_grad_(), *index))
    torch.library.opcheck(ops.masked_sum.default, (dense, *index))
