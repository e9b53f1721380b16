import pytest
import torch

from fastmim.ops import TileIndex, random_mask
from fastmim.ops.tile_index import REACH, tile_index_ref
from tests.ops.support import backends_of, poisoned_memory

BACKENDS = backends_of("tile_index")
# B, (gh, gw), K
CASES = [
    (8, (7, 7), 20),
    (3, (3, 5), 1),
    (2, (5, 3), 15),
    (1, (1, 1), 1),
    (4, (1, 9), 4),
    (70, (12, 12), 63),
    (0, (2, 2), 1),
]


def some_ids(batch, grid, count, seed=0, device="cpu"):
    """Distinct cells of each image, in random order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, grid[0] * grid[1], generator=generator).argsort(1)[:, :count].contiguous().to(device)


@pytest.mark.parametrize("batch, grid, count", CASES)
@pytest.mark.parametrize("backend", backends_of("tile_index", reference=False))
def test_equals_reference_exactly(backend, batch, grid, count):
    ids = some_ids(batch, grid, count, device=backend.device)
    with poisoned_memory():
        tiles = TileIndex.from_ids_keep(ids, grid, backend=backend)
    for name, a, b in zip(
        ("slots", "neighbours"), (tiles.slots, tiles.neighbours), tile_index_ref(ids, grid), strict=True
    ):
        assert a.dtype == b.dtype == torch.int32, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_mean_what_they_say(backend):
    """Written out cell by cell."""
    (gh, gw), ids = (3, 4), some_ids(3, (3, 4), 5, device=backend.device)
    tiles = TileIndex.from_ids_keep(ids, (gh, gw), backend=backend)
    assert (tiles.batch, tiles.count, tiles.grid, tiles.device.type) == (3, 5, (3, 4), ids.device.type)
    for b, cells in enumerate(ids.tolist()):
        assert tiles.slots[b].tolist() == [cells.index(n) if n in cells else -1 for n in range(gh * gw)]
        for k, cell in enumerate(cells):
            for dr in range(-REACH, REACH + 1):
                for dc in range(-REACH, REACH + 1):
                    row, column = cell // gw + dr, cell % gw + dc
                    inside = 0 <= row < gh and 0 <= column < gw
                    expected = cells.index(row * gw + column) if inside and row * gw + column in cells else -1
                    assert tiles.neighbours[b, k, dr + REACH, dc + REACH] == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_what_random_mask_gives(backend):
    masks = random_mask(4, 49, 20, torch.tensor([1, 2, 0], device=backend.device))
    tiles = TileIndex.from_ids_keep(masks.ids_keep, (7, 7), backend=backend)
    assert torch.equal(tiles.slots < 0, masks.mask)
    own = torch.arange(20, dtype=torch.int32, device=backend.device).expand(4, -1)
    assert torch.equal(tiles.neighbours[:, :, REACH, REACH], own)


@pytest.mark.parametrize("backend", backends_of("tile_index", reference=False, isas=("avx512",)))
def test_opcheck(backend):
    torch.library.opcheck(torch.ops.fastmim.tile_index.default, (some_ids(2, (3, 4), 5), 3, 4, backend.plain))


@pytest.mark.parametrize("backend", backends_of("tile_index", isas=("avx512",)))
def test_compiles_without_graph_breaks(backend):
    plain, ids = backend.plain, some_ids(2, (3, 4), 5, device=backend.device)

    def function(ids):
        tiles = TileIndex.from_ids_keep(ids, (3, 4), backend=plain)
        return tiles.slots, tiles.neighbours

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(ids), function(ids), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [[[0, 1], [2, 12]], [[0, 1], [-1, 3]], [[0, 1], [3, 3]]])
def test_the_cpu_kernel_refuses_ids_that_cannot_be(bad):
    with pytest.raises(ValueError, match=r"ids_keep\[1, [01]\] is (12|-1|3), out of \[0, 12\) or there twice"):
        TileIndex.from_ids_keep(torch.tensor(bad), (3, 4), backend="cpu")


@pytest.mark.parametrize(
    "ids, grid, message",
    [
        (torch.zeros(2, 5, dtype=torch.int32), (3, 4), r"must be int64 \[B, K\], got torch.int32 \[2, 5\]"),
        (torch.zeros(5, dtype=torch.int64), (3, 4), r"got torch.int64 \[5\]"),
        (torch.zeros(2, 13, dtype=torch.int64), (3, 4), "keeps 13 of the 3 x 4 = 12 cells"),
        (torch.zeros(2, 0, dtype=torch.int64), (3, 4), "keeps 0 of the 3 x 4 = 12 cells"),
    ],
)
def test_names_what_does_not_fit(ids, grid, message):
    with pytest.raises(ValueError, match=message):
        TileIndex.from_ids_keep(ids, grid)
