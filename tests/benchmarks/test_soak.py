"""The soak: what it looks at, and that it can tell growth from none."""

import math

import pytest

from benchmarks import soak
from benchmarks.photographs import write_photographs

TINY = ["--model.patch_size=16", '--model.kwargs={"depth": 1, "embed_dim": 24}', "--img_size=32", "--batch_size=8"]


def test_a_rise_is_that_of_the_second_half():
    flat = [{"files": 40.0 if t > 4 else 3.0} for t in range(200)]
    assert soak.rise(flat, "files") == 0
    leaking = [{"files": 100.0 + 0.1 * t} for t in range(200)]
    assert soak.rise(leaking, "files") == pytest.approx(100 * 10 / 115, abs=0.5)
    up_and_down = [{"memory_mb": 500.0 + 50 * (t * 7 % 10 > 4)} for t in range(200)]
    assert abs(soak.rise(up_and_down, "memory_mb")) < 0.5
    assert math.isnan(soak.rise(flat[:3], "files")), "too short to tell"


def test_bars_go_from_the_least_to_the_most():
    assert soak.spark([1, 1, 2, 3]) == "▁▁▅█".replace("▅", soak._BARS[round(3.5)])
    assert soak.spark([5, 5]) == "▁▁"


@pytest.mark.slow
def test_the_real_command_is_watched_with_its_workers_and_stopped_as_a_person_would(tmp_path):
    (tmp_path / "images").mkdir()
    write_photographs(tmp_path / "images", 16)
    samples, ending = soak.soak(tmp_path, seconds=2, every=0.3, extra=TINY)
    assert ending["exit_code"] == 130
    assert ending["steps"] > 5
    assert len(samples) > 2
    assert all(sample.keys() == {"seconds", *soak.WATCHED} for sample in samples)
    last = samples[-1]
    assert last["processes"] == 3, "two data workers"
    assert last["memory_mb"] > 50
    assert last["files"] > 10
    assert last["images_per_second"] > 0
    soak.show(samples, {name: soak.rise(samples, name) for name in soak.WATCHED}, ending, True, 1.0)
