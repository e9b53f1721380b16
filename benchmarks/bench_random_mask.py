"""random_mask against MAE's way: uniform noise, two argsorts, two gathers."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.runner import Case, Settings, Side, backends_here
from fastmim.ops import random_mask


def plain_mask(num_cells: int, num_keep: int, batch: int, rng: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rng` only says on which device."""
    noise = torch.rand(batch, num_cells, device=rng.device)
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    mask = torch.ones(batch, num_cells, device=rng.device)
    mask[:, :num_keep] = 0
    return ids_shuffle[:, :num_keep], ids_restore, torch.gather(mask, 1, ids_restore)


def _inputs(device: torch.device) -> tuple[Tensor]:
    return (torch.randint(0, 2**31, (3,), device=device),)


def cases(settings: Settings) -> Iterator[Case]:
    shapes = [(4, 49, 19)] if settings.quick else [(64, 196, 49), (256, 196, 49), (256, 49, 19), (64, 1024, 256)]
    for backend in backends_here("random_mask", settings, torch.int64):
        for batch, cells, keep in shapes:
            yield Case(
                op="random_mask",
                case=f"B{batch} N{cells} K{keep}",
                candidate=Side(backend, partial(random_mask, batch, cells, keep, backend=backend)),
                baseline=Side("torch", partial(plain_mask, cells, keep, batch)),
                inputs=partial(_inputs, settings.device),
                dtype=torch.int64,
                passes=("forward",),
                tolerance=None,  # other random numbers
                images=batch,
                moved={"forward": batch * (9 * cells + 8 * keep)},
            )
