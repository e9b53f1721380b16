"""The emulation of CUDA on the host does what a device does, and says where a device would hang."""

import ctypes

import numpy as np
import pytest

from tests.cuda_emulation import host_build

pytestmark = pytest.mark.skipif(bool(host_build.why_not()), reason=host_build.why_not())


@pytest.fixture(params=[False, True], ids=["in order", "backwards"])
def kernels(request):
    library = host_build.load("kernels.cpp")
    library.set_reversed(int(request.param))
    yield library
    library.set_reversed(0)


def run(function, *arguments):
    function.restype = ctypes.c_char_p
    wrong = function(*(a.ctypes.data_as(ctypes.c_void_p) if isinstance(a, np.ndarray) else a for a in arguments))
    return wrong.decode() if wrong else ""


def test_threads_and_blocks_know_where_they_are(kernels):
    out = np.full((4, 3, 2, 3, 2, 5, 6), -1, dtype=np.int32)
    assert run(kernels.where, out) == ""
    for axis, place in enumerate((5, 4, 3, 2, 1, 0)):  # x is the fastest
        shape = [1] * 6
        shape[place] = out.shape[place]
        assert (out[..., axis] == np.arange(out.shape[place]).reshape(shape)).all()


@pytest.mark.parametrize("threads", [1, 33, 256])
def test_a_barrier_waits_for_everybody(kernels, threads):
    values, out = np.random.default_rng(0).random(threads, dtype=np.float32), np.zeros(threads, dtype=np.float32)
    assert run(kernels.reversed_copy, 1, threads, values, out) == ""
    assert (out == values[::-1]).all()


def test_a_missing_barrier_shows(kernels):
    """What has not been written yet is NaN."""
    values, out = np.ones(64, dtype=np.float32), np.zeros(64, dtype=np.float32)
    assert run(kernels.reversed_copy, 0, 64, values, out) == ""
    assert np.isnan(out).sum() == 32


def test_shared_memory_starts_as_nan_in_every_block(kernels):
    out = np.zeros(3, dtype=np.float32)
    assert run(kernels.shared_at_start, out) == ""
    assert np.isnan(out).all()


def test_barriers_go_on_without_threads_that_ended(kernels):
    out = np.zeros((8, 64), dtype=np.int32)
    assert run(kernels.barriers, out) == ""
    assert (out[:4] == 64).all()
    assert (out[4:, :40] == 40).all()
    assert (out[4:, 40:] == 0).all()


def test_warps_exchange_values(kernels):
    values = np.random.default_rng(1).integers(0, 100, 64).astype(np.float64)
    sums, prefix = np.ones(64), np.zeros(64, dtype=np.int32)
    words = np.full((64, 4), 7, dtype=np.uint32)
    assert run(kernels.warps, values, sums, prefix, words) == ""
    assert (sums == 0).all()  # whole numbers: both ways of adding up a warp agree
    assert (prefix == np.arange(64) % 8 + 1).all()
    assert (words[:, 0] == 0xAAAAAAAA).all()
    assert (words[:, 1] == 1).all()
    assert (words[:, 2] == 0).all()
    assert (words[1::2, 3] == 8).all()  # lanes 17, 19, ... 31
    assert (words[::2, 3] == 7).all()


@pytest.mark.parametrize(
    "which, messages",
    [
        (0, ["deadlock: 32 threads have ended", "33 wait at __syncthreads", "31 wait at __ballot_sync"]),
        (1, ["is not in its mask"]),
        (2, ["0 threads have ended, 48 wait at __ballot_sync of lanes ffffffff (first: (0, 0, 0))"]),
        (2, ["48 wait at __shfl_sync of lanes ffffffff (first: (1, 0, 0))"]),
    ],
)
def test_what_would_hang_is_reported(kernels, which, messages):
    out = np.zeros(96, dtype=np.int32)
    wrong = run(kernels.hang, which, out)
    for message in messages:
        assert message in wrong
    assert wrong.startswith("block (")
    assert run(kernels.reversed_copy, 1, 4, np.ones(4, np.float32), np.ones(4, np.float32)) == "", "reported once"
