import numpy as np
import pytest
import torch

from fastmim.ops import random_mask
from fastmim.ops.philox import philox_ref
from fastmim.ops.random_mask import random_mask_ref
from tests.ops.support import backends_of, poisoned_memory

SHAPES = [(4, 196, 49), (3, 49, 19), (1, 2, 1), (2, 7, 6), (5, 129, 1), (2, 1030, 513), (0, 49, 10)]


def rng(seed=7, step=3, first=0, device="cpu"):
    return torch.tensor([seed, step, first], device=device)


@pytest.mark.parametrize("counter", [(0, 0, 0, 0), (1, 2, 3, 4), (2**32 - 1,) * 4])
@pytest.mark.parametrize("seed", [0, 2**40 + 5, -1])
def test_reference_is_philox_in_python_integers(counter, seed):
    words, key = list(counter), [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        a, b = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [(b >> 32) ^ words[1] ^ key[0], b & 0xFFFFFFFF, (a >> 32) ^ words[3] ^ key[1], a & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    ours = philox_ref(tuple(torch.tensor(c) for c in counter), torch.tensor(seed))
    assert ours.tolist() == words


def test_philox_known_answers():
    """The published test vectors of Random123 for philox4x32-10."""
    zeros = philox_ref((torch.tensor(0),) * 4, torch.tensor(0))
    assert [f"{w:08x}" for w in zeros.tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = philox_ref((torch.tensor(0xFFFFFFFF),) * 4, torch.tensor(-1))
    assert [f"{w:08x}" for w in ones.tolist()] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


@pytest.mark.parametrize("backend", backends_of("random_mask", reference=False))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("state", [(0, 0, 0), (2**40 + 7, 2**33 + 1, 2**31), (-3, 5, 1023)])
def test_equals_reference_exactly(backend, shape, state):
    state = rng(*state, device=backend.device)
    with poisoned_memory():
        ours = random_mask(*shape, state, backend=backend)
    for name, a, b in zip(ours._fields, ours, random_mask_ref(*shape, state), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("backend", backends_of("random_mask"))
def test_keeps_the_same_count_and_restores_the_order(backend):
    ids_keep, ids_restore, mask = random_mask(16, 196, 49, rng(device=backend.device), backend=backend)
    assert (mask.sum(1) == 147).all()
    assert not mask.gather(1, ids_keep).any(), "a kept cell is marked as removed"
    ids_shuffle = ids_restore.argsort(1)
    assert torch.equal(ids_shuffle[:, :49], ids_keep)
    assert torch.equal(ids_shuffle.gather(1, ids_restore), torch.arange(196, device=mask.device).expand(16, -1))


@pytest.mark.parametrize("backend", backends_of("random_mask"))
def test_a_second_call_with_an_offset_continues_the_batch(backend):
    """Two ranks (or micro-batches) of four draw what one process draws for eight."""
    whole = random_mask(8, 49, 19, rng(device=backend.device), backend=backend)
    halves = [random_mask(4, 49, 19, rng(first=f, device=backend.device), backend=backend) for f in (0, 4)]
    for a, b, c in zip(whole, *halves, strict=True):
        assert torch.equal(a, torch.cat((b, c)))


def test_steps_seeds_and_images_differ():
    masks = [random_mask(2, 196, 49, rng(seed, step)).mask for seed in (0, 1) for step in (0, 1)]
    flat = torch.cat(masks)
    assert len(np.unique(flat.numpy(), axis=0)) == 8


def test_every_cell_is_equally_likely():
    mask = random_mask(4096, 49, 19, rng()).mask
    share = mask.double().mean(0)
    sigma = (30 / 49 * 19 / 49 / 4096) ** 0.5
    assert (share - 30 / 49).abs().max() < 4.5 * sigma


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_masks(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mask = random_mask(33, 196, 49, rng()).mask
    finally:
        torch.set_num_threads(before)
    assert torch.equal(mask, random_mask_ref(33, 196, 49, rng()).mask)


@pytest.mark.parametrize("backend", backends_of("random_mask", isas=("avx512",)))
def test_compiles_without_graph_breaks(backend):
    state, plain = rng(device=backend.device), backend.plain
    compiled = torch.compile(lambda r: random_mask(4, 49, 19, r, backend=plain), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(state), random_mask_ref(4, 49, 19, state), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", backends_of("random_mask", reference=False, isas=("avx512",)))
def test_opcheck(backend):
    state = rng(device=backend.device)
    torch.library.opcheck(torch.ops.fastmim.random_mask.default, (3, 49, 19, state, backend.plain))
    torch.library.opcheck(
        torch.ops.fastmim.random_mask.default, (3, 49, 19, state.repeat_interleave(2)[::2], backend.plain)
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((2, 49, 0, rng()), "num_keep is 0 of 49"),
        ((2, 49, 49, rng()), "num_keep is 49 of 49"),
        ((2, 1, 1, rng()), "at least one cell must stay and one must go"),
        ((-1, 49, 19, rng()), "batch_size is -1"),
        ((2, 49, 19, rng().int()), "int64"),
        ((2, 49, 19, rng()[:2]), r"\[2\]"),
        ((2, 1 << 27, 19, rng()), "can be numbered"),
    ],
)
def test_names_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        random_mask(*arguments)


def test_a_backend_asked_for_by_name_fails_loudly(monkeypatch):
    with pytest.raises(ValueError, match="unknown backend backend='cudnn'"):
        random_mask(2, 49, 19, rng(), backend="cudnn")
    with pytest.raises(ValueError, match="has no cuda kernel"):
        random_mask(2, 49, 19, rng(), backend="cuda")
    monkeypatch.setenv("FASTMIM_BACKEND", "cuda")
    with pytest.raises(ValueError, match="FASTMIM_BACKEND="):
        random_mask(2, 49, 19, rng())
