"""Mixing maps: which image of a group shows at which position of the group's mixed sequence.

Legend: B images in groups of G, L positions of a sequence, M [B / G, L] the map.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastmim.ops.backends import Backends, compiled
from fastmim.ops.philox import philox_ref
from fastmim.ops.random_mask import MAX_CELLS, Masks

__all__ = ["MixingMap", "mixing_map", "mixing_map_ref"]

MAX_GROUP_SIZE = 64
_backends = Backends("mixing_map", cpu="mixing_map", triton="fastmim.kernels.mixing_map")


class MixingMap(NamedTuple):
    """segments [B / G, L] int64 in [0, G): M; mask [B, L] bool, True = the position shows another image.

    Image b is number b % G of group b // G, so mask[b] = segments[b // G] != b % G. Where G does not divide L, some
    images own one position more than others; nothing here depends on the count, so all shapes stay static.
    """

    segments: Tensor
    mask: Tensor

    @property
    def group_size(self) -> int:
        return self.mask.shape[0] // max(self.segments.shape[0], 1)

    def masks(self) -> Masks:
        """The same in the vocabulary of MAE: ids_keep [B, L / G] ascending, ids_restore [B, L], mask.

        Raises:
            ValueError: G does not divide L, so the images keep different counts.
        """
        length = self.segments.shape[1]
        if length % self.group_size:
            raise ValueError(
                f"MixingMap.masks: {length} positions in groups of {self.group_size} give some images one more than "
                f"others, so there is no ids_keep of one shape; use segments and mask"
            )
        kept = length // self.group_size
        ids_restore = torch.where(self.mask, self.mask.cumsum(1) + kept, (~self.mask).cumsum(1)) - 1
        places = torch.arange(length, device=self.mask.device).expand_as(ids_restore)
        ids_shuffle = torch.empty_like(ids_restore).scatter_(1, ids_restore, places)
        return Masks(ids_shuffle[:, :kept].contiguous(), ids_restore, self.mask)

    def shifted(self, by: int) -> "MixingMap":
        """The map (M + by) mod G: each position shows the image `by` places further on in its group."""
        segments = (self.segments + by) % self.group_size
        images = torch.arange(self.group_size, device=segments.device)
        return MixingMap(segments, (segments[:, None] != images[:, None]).flatten(0, 1))


def mixing_map_ref(num_groups: int, group_size: int, num_cells: int, rng: Tensor) -> MixingMap:
    """What the operation means, in plain PyTorch, on the device of `rng`.

    With key = seed, word n % 4 of Philox at (n // 4, group in the global batch, step low, step high) is the noise of
    position n where n < L, and of image n - L of the group from there on. Positions in ascending order of (noise, n)
    are cut into G parts, the first L mod G of them one longer; part t goes to the image with the t-th lowest noise.
    """
    seed, step, first = rng.unbind()
    block = torch.arange((num_cells + group_size + 3) // 4, device=rng.device)
    group = (first // group_size + torch.arange(num_groups, device=rng.device)) & 0xFFFFFFFF
    words = philox_ref((block, group[:, None], step & 0xFFFFFFFF, (step >> 32) & 0xFFFFFFFF), seed)
    noise = words.flatten(1) if num_groups else words.new_empty(0, 4 * len(block))
    rank = noise[:, :num_cells].argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    image_of_part = noise[:, num_cells : num_cells + group_size].argsort(dim=1, stable=True)
    length, longer = divmod(num_cells, group_size)
    in_longer = longer * (length + 1)  # ranks that the longer parts take
    part = torch.where(rank < in_longer, rank // (length + 1), longer + (rank - in_longer) // length)
    segments = image_of_part.gather(1, part)
    mask = segments[:, None] != torch.arange(group_size, device=rng.device)[:, None]
    return MixingMap(segments, mask.flatten(0, 1))


torch.library.define(
    "fastmim::mixing_map",
    "(int num_groups, int group_size, int num_cells, Tensor rng, str backend) -> (Tensor, Tensor)",
)


def _empty(num_groups: int, group_size: int, num_cells: int, rng: Tensor) -> MixingMap:
    """Outputs on the device of `rng`, not yet written."""
    return MixingMap(
        rng.new_empty((num_groups, num_cells)),
        rng.new_empty((num_groups * group_size, num_cells), dtype=torch.bool),
    )


@torch.library.impl("fastmim::mixing_map", ("cpu", "cuda"))
def _run(num_groups: int, group_size: int, num_cells: int, rng: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    rng = rng.contiguous()
    out = _empty(num_groups, group_size, num_cells, rng)
    if backend == "triton":
        _backends.triton().mixing_map(rng, group_size, *out)
    else:
        compiled().mixing_map(num_groups, group_size, num_cells, rng.data_ptr(), *(tensor.data_ptr() for tensor in out))
    return tuple(out)  # type: ignore[return-value]


@torch.library.register_fake("fastmim::mixing_map")
def _fake(num_groups: int, group_size: int, num_cells: int, rng: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return tuple(_empty(num_groups, group_size, num_cells, rng))  # type: ignore[return-value]


def mixing_map(
    num_groups: int, group_size: int, num_cells: int, rng: Tensor, *, backend: str | None = None
) -> MixingMap:
    """Random maps that give each image of a group floor(L / G) or ceil(L / G) positions; every position has one owner.

    A pure function of `rng`: the same on every backend and device, eager or captured.

    Args:
        num_groups: B / G, groups of this call. (`groups_of` divides a batch and says so where it does not.)
        group_size: G, images in a group, at least 2.
        num_cells: L, positions of a sequence (gh * gw, row-major), at least G.
        rng: [3] int64 on the device where the map is wanted: (seed, step, first). `first`, a multiple of G, is the
            index of this call's first image in the global batch; group first / G + i draws the map i.
        backend: "reference", "cpu" or "triton"; chosen by device when None.

    Returns:
        MixingMap: segments [B / G, L] int64; mask [B, L] bool, True = the position shows another image.

    Raises:
        ValueError: counts out of range, an `rng` of another shape or dtype, or a backend asked for by name that cannot
            run, with its reason.

    Source: MixedAE (arXiv 2303.17152), mixing with r = 1 / G; Philox: Salmon et al., SC 2011.
    """
    if not 2 <= group_size <= MAX_GROUP_SIZE:
        raise ValueError(f"mixing_map: group_size is {group_size}; a group has 2 to {MAX_GROUP_SIZE} images")
    if num_cells < group_size:
        raise ValueError(
            f"mixing_map: {num_cells} positions are too few for groups of {group_size} images: each must own one"
        )
    if num_cells > MAX_CELLS - group_size:
        raise ValueError(f"mixing_map: {num_cells} positions are more than the {MAX_CELLS} that can be numbered")
    if num_groups < 0:
        raise ValueError(f"mixing_map: num_groups is {num_groups}")
    if rng.shape != (3,) or rng.dtype != torch.int64:
        raise ValueError(f"mixing_map: rng must be int64 [3] (seed, step, first), got {rng.dtype} {list(rng.shape)}")
    chosen = _backends.choose(rng.device, backend=backend)
    if chosen == "reference":
        return mixing_map_ref(num_groups, group_size, num_cells, rng)
    return MixingMap(*torch.ops.fastmim.mixing_map(num_groups, group_size, num_cells, rng, chosen))


def groups_of(batch_size: int, group_size: int, op: str) -> int:
    """How many groups of G a batch has.

    Raises:
        ValueError: G does not divide it, with the nearest sizes that would do.
    """
    if batch_size % group_size:
        below, above = batch_size // group_size * group_size, -(-batch_size // group_size) * group_size
        near = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"{op}: a batch of {batch_size} images does not divide into groups of {group_size}; a batch of {near} does"
        )
    return batch_size // group_size
