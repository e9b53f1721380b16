"""Disks and checkpoints that go wrong: rows 12, 13, 16 and 50 to 53 of the fault table, on the real command."""

import os
import shutil

import pytest

from tests.faults.command import checkpoints, ending, metrics, train

pytestmark = pytest.mark.slow


@pytest.fixture
def finished(tmp_path, unbroken):
    return shutil.copytree(unbroken, tmp_path / "run")


def test_a_damaged_checkpoint_is_passed_over_by_auto_and_refused_by_path(finished, unbroken):
    last = finished / "checkpoints" / "step-00000012"
    os.truncate(last / "method.safetensors", (last / "method.safetensors").stat().st_size - 1)
    asked = train(finished, resume=last)
    assert asked.returncode == 2
    assert "damaged" in asked.stderr
    assert "Traceback" not in asked.stderr
    assert last.is_dir()

    done = train(finished)
    assert done.returncode == 0, done.stderr
    assert "damaged" in done.stderr
    assert checkpoints(finished)[0] == "damaged-step-00000012"
    assert metrics(finished) == metrics(unbroken)


def test_a_disk_that_stays_full_ends_the_run_with_5_and_keeps_the_good_one(tmp_path):
    out = tmp_path / "run"
    full = train(out, inject="enospc@checkpoint_write=4-", engine__checkpoint_every=2)
    assert full.returncode == 5, full.stderr
    assert full.stderr.count("No checkpoint at step") == 3
    assert checkpoints(out) == ["step-00000002"]
    assert [line["step"] for line in metrics(out)] == list(range(1, 9))
    assert ending(out)["code"] == 5


def test_a_pickle_is_no_checkpoint_and_does_not_run(tmp_path, finished):
    import pickle

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    evil = finished / "checkpoints" / "step-00000012" / "method.safetensors"
    evil.write_bytes(pickle.dumps(Payload()))
    answered = train(finished, resume=evil.parent)
    assert answered.returncode == 2
    assert "damaged" in answered.stderr
    assert not (tmp_path / "executed").exists()
