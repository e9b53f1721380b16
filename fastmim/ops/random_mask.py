"""Random masks that remove the same number of cells from every image.

Legend: B batch, N cells of an image, K visible cells.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastmim.ops.backends import Backends, compiled
from fastmim.ops.philox import philox_ref

__all__ = ["Masks", "random_mask", "random_mask_ref"]

MAX_CELLS = 1 << 26  # four cells share one Philox counter; its first word counts up to there with room to spare
_backends = Backends("random_mask", cpu="random_mask", triton="fastmim.kernels.random_mask")


class Masks(NamedTuple):
    """ids_keep [B, K] int64, ids_restore [B, N] int64, mask [B, N] bool with True = removed."""

    ids_keep: Tensor
    ids_restore: Tensor
    mask: Tensor


def random_mask_ref(batch_size: int, num_cells: int, num_keep: int, rng: Tensor) -> Masks:
    """What the operation means, in plain PyTorch, on the device of `rng`.

    The noise of cell n of image b is word n % 4 of Philox with key = seed and counter = (n // 4, first + b, step low,
    step high). Cells are ranked by (noise, n); the K lowest stay.
    """
    seed, step, first = rng.unbind()
    block = torch.arange((num_cells + 3) // 4, device=rng.device)
    image = (first + torch.arange(batch_size, device=rng.device)) & 0xFFFFFFFF
    words = philox_ref((block, image[:, None], step & 0xFFFFFFFF, (step >> 32) & 0xFFFFFFFF), seed)
    noise = words.flatten(1)[:, :num_cells] if batch_size else words.new_empty(0, num_cells)
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1, stable=True)
    return Masks(ids_shuffle[:, :num_keep].contiguous(), ids_restore, ids_restore >= num_keep)


torch.library.define(
    "fastmim::random_mask",
    "(int batch_size, int num_cells, int num_keep, Tensor rng, str backend) -> (Tensor, Tensor, Tensor)",
)


def _empty(batch_size: int, num_cells: int, num_keep: int, rng: Tensor) -> Masks:
    """Outputs on the device of `rng`, not yet written."""
    return Masks(
        rng.new_empty((batch_size, num_keep)),
        rng.new_empty((batch_size, num_cells)),
        rng.new_empty((batch_size, num_cells), dtype=torch.bool),
    )


@torch.library.impl("fastmim::random_mask", ("cpu", "cuda"))
def _run(batch_size: int, num_cells: int, num_keep: int, rng: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    rng = rng.contiguous()
    out = _empty(batch_size, num_cells, num_keep, rng)
    if backend == "triton":
        _backends.triton().random_mask(rng, *out)
    else:
        compiled().random_mask(batch_size, num_cells, num_keep, rng.data_ptr(), *(tensor.data_ptr() for tensor in out))
    return tuple(out)  # type: ignore[return-value]


@torch.library.register_fake("fastmim::random_mask")
def _fake(batch_size: int, num_cells: int, num_keep: int, rng: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(_empty(batch_size, num_cells, num_keep, rng))  # type: ignore[return-value]


def random_mask(batch_size: int, num_cells: int, num_keep: int, rng: Tensor, *, backend: str | None = None) -> Masks:
    """Fixed-count random masks, a pure function of `rng`: the same on every backend and device, eager or captured.

    Args:
        batch_size: B, images of this call.
        num_cells: N, cells of an image (gh * gw, row-major).
        num_keep: K, visible cells of every image, 1 <= K < N.
        rng: [3] int64 on the device where the masks are wanted: (seed, step, first). `first` is the index of this
            call's first image in the global batch, so that ranks and micro-batches draw different masks.
        backend: "reference", "cpu" or "triton"; chosen by device when None.

    Returns:
        Masks: ids_keep [B, K] int64 in noise order as MAE has it; ids_restore [B, N] int64, which puts
        cat(visible, removed) back in place; mask [B, N] bool, True = removed.

    Raises:
        ValueError: counts out of range (a mask that removes nothing or everything makes the loss 0/0), an `rng` of
            another shape or dtype, or a backend asked for by name that cannot run, with its reason.

    Source: MAE (arXiv 2111.06377) section 3, per-sample shuffling; Philox: Salmon et al., SC 2011.
    """
    if not 0 < num_keep < num_cells:
        raise ValueError(
            f"random_mask: num_keep is {num_keep} of {num_cells} cells; at least one cell must stay and one must go"
        )
    if num_cells > MAX_CELLS:
        raise ValueError(f"random_mask: {num_cells} cells are more than the {MAX_CELLS} that can be numbered")
    if batch_size < 0:
        raise ValueError(f"random_mask: batch_size is {batch_size}")
    if rng.shape != (3,) or rng.dtype != torch.int64:
        raise ValueError(f"random_mask: rng must be int64 [3] (seed, step, first), got {rng.dtype} {list(rng.shape)}")
    chosen = _backends.choose(rng.device, backend=backend)
    if chosen == "reference":
        return random_mask_ref(batch_size, num_cells, num_keep, rng)
    return Masks(*torch.ops.fastmim.random_mask(batch_size, num_cells, num_keep, rng, chosen))
