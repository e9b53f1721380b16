import numpy as np
import pytest
import torch

from fastmim.ops import mixing_map, random_mask
from fastmim.ops.mixing_map import MixingMap, groups_of, mixing_map_ref
from tests.ops.support import backends_of, poisoned_memory

# B / G, G, L
SHAPES = [(3, 4, 196), (2, 2, 49), (1, 3, 49), (2, 5, 196), (2, 7, 130), (1, 8, 8), (1, 6, 11), (0, 4, 49)]


def rng(seed=7, step=3, first=0, device="cpu"):
    return torch.tensor([seed, step, first], device=device)


@pytest.mark.parametrize("backend", backends_of("mixing_map", reference=False))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("state", [(0, 0, 0), (2**40 + 7, 2**33 + 1, 2**33 * 840), (-3, 5, 8400)])
def test_equals_reference_exactly(backend, shape, state):
    state = rng(*state, device=backend.device)
    with poisoned_memory():
        ours = mixing_map(*shape, state, backend=backend)
    for name, a, b in zip(ours._fields, ours, mixing_map_ref(*shape, state), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("backend", backends_of("mixing_map"))
@pytest.mark.parametrize("shape", SHAPES)
def test_every_position_has_one_owner_and_the_counts_are_equal(backend, shape):
    groups, size, length = shape
    segments, mask = mixing_map(*shape, rng(device=backend.device), backend=backend)
    assert segments.shape == (groups, length)
    assert mask.shape == (groups * size, length)
    assert ((~mask).reshape(groups, size, length).sum(1) == 1).all(), "a position has no owner, or two"
    counts = (~mask).sum(1).reshape(groups, size)
    assert (counts >= length // size).all()
    assert (counts <= -(-length // size)).all()
    assert ((counts == length // size + 1).sum(1) == length % size).all()
    owners = torch.arange(size, device=mask.device).repeat(groups)
    assert torch.equal(~mask, segments.repeat_interleave(size, 0) == owners[:, None])


def test_the_longer_parts_go_to_random_images():
    """49 = 3 * 16 + 1: each of the three images is the one with 17 positions about as often."""
    counts = (~mixing_map(3000, 3, 49, rng()).mask).sum(1).reshape(3000, 3)
    share = (counts == 17).double().mean(0)
    assert (share - 1 / 3).abs().max() < 4.5 * (2 / 9 / 3000) ** 0.5


def test_every_position_is_equally_likely():
    share = (~mixing_map(4096, 4, 49, rng()).mask).double().reshape(4096, 4, 49).mean(0)
    assert (share - 0.25).abs().max() < 4.5 * (3 / 16 / 4096) ** 0.5


@pytest.mark.parametrize("backend", backends_of("mixing_map"))
def test_a_second_call_with_an_offset_continues_the_batch(backend):
    whole = mixing_map(4, 3, 49, rng(first=6, device=backend.device), backend=backend)
    halves = [mixing_map(2, 3, 49, rng(first=f, device=backend.device), backend=backend) for f in (6, 12)]
    for a, b, c in zip(whole, *halves, strict=True):
        assert torch.equal(a, torch.cat((b, c)))


def test_steps_seeds_and_groups_differ():
    maps = [mixing_map(2, 4, 196, rng(seed, step)).segments for seed in (0, 1) for step in (0, 1)]
    assert len(np.unique(torch.cat(maps).numpy(), axis=0)) == 8


def test_speaks_the_vocabulary_of_mae():
    mixing = mixing_map(2, 4, 196, rng())
    ids_keep, ids_restore, mask = mixing.masks()
    assert ids_keep.shape == (8, 49)
    assert (ids_keep.diff(dim=1) > 0).all()
    assert not mask.gather(1, ids_keep).any()
    assert torch.equal(ids_restore < 49, ~mask)
    places = torch.arange(196).expand(8, -1)
    kept = ids_keep.gather(1, ids_restore.clamp(max=48))
    assert torch.equal(torch.where(mask, places, kept), places)
    # A group's order of positions is that of random_mask for the image of the same number.
    order = random_mask(2, 196, 49, rng()).ids_keep.sort(dim=1).values
    parts = mixing.segments.gather(1, order)
    assert (parts == parts[:, :1]).all()


def test_shifted_maps_of_a_group_cover_every_image_everywhere():
    mixing = mixing_map(2, 5, 49, rng())
    maps = [mixing.shifted(by) for by in range(5)]
    assert torch.equal(maps[0].mask, mixing.mask)
    seen = torch.stack([m.segments for m in maps]).sort(0).values
    assert torch.equal(seen, torch.arange(5)[:, None, None].expand_as(seen))
    for m in maps:
        owners = torch.arange(5).repeat(2)
        assert torch.equal(~m.mask, m.segments.repeat_interleave(5, 0) == owners[:, None])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_maps(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        segments = mixing_map(200, 4, 196, rng()).segments
    finally:
        torch.set_num_threads(before)
    assert torch.equal(segments, mixing_map_ref(200, 4, 196, rng()).segments)


@pytest.mark.parametrize("backend", backends_of("mixing_map", isas=("avx512",)))
def test_compiles_without_graph_breaks(backend):
    state, plain = rng(device=backend.device), backend.plain
    compiled = torch.compile(lambda r: mixing_map(2, 4, 49, r, backend=plain), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(state), mixing_map_ref(2, 4, 49, state), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", backends_of("mixing_map", reference=False, isas=("avx512",)))
def test_opcheck(backend):
    state = rng(device=backend.device)
    for rng_ in (state, state.repeat_interleave(2)[::2]):
        torch.library.opcheck(torch.ops.fastmim.mixing_map.default, (3, 4, 49, rng_, backend.plain))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((2, 1, 49, rng()), "group_size is 1; a group has 2 to 64 images"),
        ((2, 65, 490, rng()), "group_size is 65"),
        ((2, 8, 7, rng()), "7 positions are too few for groups of 8"),
        ((-1, 4, 49, rng()), "num_groups is -1"),
        ((2, 4, 49, rng().int()), "int64"),
        ((2, 4, 49, rng()[:2]), r"\[2\]"),
        ((2, 4, 1 << 27, rng()), "can be numbered"),
    ],
)
def test_names_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        mixing_map(*arguments)


def test_a_batch_that_does_not_divide_is_answered_with_ones_that_do():
    assert groups_of(12, 4, "patch_mix") == 3
    with pytest.raises(ValueError, match="a batch of 10 images does not divide into groups of 4; a batch of 8 or 12"):
        groups_of(10, 4, "patch_mix")
    with pytest.raises(ValueError, match="a batch of 4 does"):
        groups_of(3, 4, "patch_mix")


def test_unequal_counts_have_no_ids_keep():
    mixing = mixing_map(1, 3, 49, rng())
    assert isinstance(mixing, MixingMap)
    with pytest.raises(ValueError, match="49 positions in groups of 3 give some images one more"):
        mixing.masks()
