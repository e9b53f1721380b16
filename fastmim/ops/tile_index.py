"""Which cells of a masked image are visible, and who their neighbours are: made once a step, for all resolutions.

Legend: B batch, K visible cells, (gh, gw) grid of cells, N = gh * gw. A cell is 32 x 32 pixels, a tile is its features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmim.ops.backends import Backends, compiled

__all__ = ["REACH", "TileIndex", "tile_index_ref"]

REACH = 3  # cells to each side in the neighbour table: a 7x7 kernel at one position a tile looks that far
WINDOW = 2 * REACH + 1
_backends = Backends("tile_index", cpu="tile_index", triton="fastmim.kernels.tile_index")


def tile_index_ref(ids_keep: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What the operation means, in plain PyTorch, on the device of `ids_keep`: (slots, neighbours) of a TileIndex."""
    (gh, gw), (batch, count) = grid, ids_keep.shape
    rows = torch.arange(count, dtype=torch.int32, device=ids_keep.device).expand(batch, count)
    slots = torch.full((batch, gh * gw), -1, dtype=torch.int32, device=ids_keep.device).scatter(1, ids_keep, rows)
    padded = torch.full((batch, gh + 2 * REACH, gw + 2 * REACH), -1, dtype=torch.int32, device=ids_keep.device)
    padded[:, REACH : REACH + gh, REACH : REACH + gw] = slots.reshape(batch, gh, gw)
    windows = padded.unfold(1, WINDOW, 1).unfold(2, WINDOW, 1)  # [B, gh, gw, 7, 7]
    image = torch.arange(batch, device=ids_keep.device).unsqueeze(1)
    return slots, windows[image, ids_keep // gw, ids_keep % gw]


@dataclass(frozen=True)
class TileIndex:
    """The visible cells of a batch of images, as the masked operations take them.

    One index serves every resolution: features at stride s are tiles [B, K, t, t, C] with t = 32 / s, in the order of
    `ids_keep`, and a k x k kernel reaches ceil((k // 2) / t) cells, never more than three.
    """

    ids_keep: Tensor
    """[B, K] int64: position of every visible cell in the row-major grid, distinct within an image, in any order."""
    slots: Tensor
    """[B, N] int32: the tile of a cell, or -1 where the cell is masked."""
    neighbours: Tensor
    """[B, K, 7, 7] int32: the tile, in the same image, of the cell (dr - 3, dc - 3) away; -1 where that cell is masked
    or outside. The centre is the tile itself."""
    grid: tuple[int, int]
    """(gh, gw): rows and columns of cells."""

    @property
    def batch(self) -> int:
        """B."""
        return self.ids_keep.shape[0]

    @property
    def count(self) -> int:
        """K, visible cells of every image."""
        return self.ids_keep.shape[1]

    @property
    def device(self) -> torch.device:
        return self.ids_keep.device

    @staticmethod
    def from_ids_keep(ids_keep: Tensor, grid: tuple[int, int], *, backend: str | None = None) -> "TileIndex":
        """Builds both tables in one kernel.

        Args:
            ids_keep: [B, K] int64, as `random_mask` gives it: distinct cells of each image, in [0, gh * gw).
            grid: (gh, gw), cells in a column and in a row of the image; gh * gw >= K >= 1.
            backend: "reference", "cpu" or "triton"; chosen by device when None.

        Returns:
            The index, on the device of `ids_keep`.

        Raises:
            ValueError: a shape, dtype or count that does not fit; or a backend asked for by name that cannot run. The
                values of `ids_keep` are checked by the CPU kernel (ids out of range or twice in an image); elsewhere
                that would mean waiting for the device, and they are the caller's promise.

        Source: the block-compact layout is fastmim's own; the constant count is SparK's (arXiv 2301.03580).
        """
        gh, gw = grid
        if ids_keep.dim() != 2 or ids_keep.dtype != torch.int64:
            raise ValueError(f"TileIndex: ids_keep must be int64 [B, K], got {ids_keep.dtype} {list(ids_keep.shape)}")
        if not 1 <= ids_keep.shape[1] <= gh * gw:
            raise ValueError(f"TileIndex: ids_keep keeps {ids_keep.shape[1]} of the {gh} x {gw} = {gh * gw} cells")
        chosen = _backends.choose(ids_keep.device, backend=backend)
        if chosen == "reference":
            slots, neighbours = tile_index_ref(ids_keep, (gh, gw))
        else:
            slots, neighbours = torch.ops.fastmim.tile_index(ids_keep, gh, gw, chosen)
        return TileIndex(ids_keep, slots, neighbours, (gh, gw))


torch.library.define(
    "fastmim::tile_index", "(Tensor ids_keep, int gh, int gw, str backend) -> (Tensor slots, Tensor neighbours)"
)


@torch.library.impl("fastmim::tile_index", ("cpu", "cuda"))
def _run(ids_keep: Tensor, gh: int, gw: int, backend: str) -> tuple[Tensor, Tensor]:
    ids_keep = ids_keep.contiguous()
    slots, neighbours = _fake(ids_keep, gh, gw, backend)
    if backend == "triton":
        _backends.triton().tile_index(ids_keep, slots, neighbours, (gh, gw))
        return slots, neighbours
    compiled().tile_index(*ids_keep.shape, gh, gw, ids_keep.data_ptr(), slots.data_ptr(), neighbours.data_ptr())
    return slots, neighbours


@torch.library.register_fake("fastmim::tile_index")
def _fake(ids_keep: Tensor, gh: int, gw: int, backend: str) -> tuple[Tensor, Tensor]:
    """Outputs not yet written."""
    batch, count = ids_keep.shape
    slots = ids_keep.new_empty((batch, gh * gw), dtype=torch.int32)
    return slots, ids_keep.new_empty((batch, count, WINDOW, WINDOW), dtype=torch.int32)
