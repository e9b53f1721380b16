"""mixing_map against the plain way: noise, an argsort, an assignment, a comparison for each image."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.runner import Case, Settings, Side, backends_here
from fastmim.ops import mixing_map


def plain_map(groups: int, size: int, cells: int, rng: Tensor) -> tuple[Tensor, Tensor]:
    """`rng` only says on which device."""
    ids_shuffle = torch.rand(groups, cells, device=rng.device).argsort(dim=1)
    parts = (torch.arange(cells, device=rng.device) * size // cells).expand(groups, -1)
    segments = torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, parts)
    images = torch.arange(size, device=rng.device)
    return segments, (segments[:, None] != images[:, None]).flatten(0, 1)


def _inputs(device: torch.device) -> tuple[Tensor]:
    return (torch.randint(0, 2**31, (3,), device=device),)


def cases(settings: Settings) -> Iterator[Case]:
    shapes = [(2, 4, 49)] if settings.quick else [(16, 4, 196), (64, 4, 196), (128, 2, 196), (16, 4, 1024)]
    for backend in backends_here("mixing_map", settings, torch.int64):
        for groups, size, cells in shapes:
            yield Case(
                op="mixing_map",
                case=f"B{groups * size} G{size} L{cells}",
                candidate=Side(backend, partial(mixing_map, groups, size, cells, backend=backend)),
                baseline=Side("torch", partial(plain_map, groups, size, cells)),
                inputs=partial(_inputs, settings.device),
                dtype=torch.int64,
                passes=("forward",),
                tolerance=None,  # other random numbers
                images=groups * size,
                moved={"forward": groups * cells * (8 + size)},
            )
