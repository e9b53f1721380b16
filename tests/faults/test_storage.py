"""Disks and checkpoints that go wrong: rows 11 to 17 of the fault table, on the real command."""

import json
import os
import shutil

import pytest

from fastmim.engine.checkpoint import read_checkpoint
from tests.faults.command import checkpoints, ending, in_a_namespace, metrics, train

pytestmark = pytest.mark.slow


def raw_metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_damaged_checkpoints_are_passed_over_by_auto_and_refused_by_path(finished, unbroken):
    """The newest is truncated, of the one before a bit is flipped and its state.json gone: the oldest is used."""
    last, second = (finished / "checkpoints" / f"step-{step:08d}" for step in (12, 8))
    os.truncate(last / "method.safetensors", (last / "method.safetensors").stat().st_size - 1)
    content = bytearray((second / "optimizer.safetensors").read_bytes())
    content[-9] ^= 4
    (second / "optimizer.safetensors").write_bytes(content)
    asked = train(finished, resume=last)
    assert asked.returncode == 2
    assert "damaged" in asked.stderr
    assert "Traceback" not in asked.stderr
    assert last.is_dir()

    done = train(finished)
    assert done.returncode == 0, done.stderr
    assert "method.safetensors has" in done.stderr
    assert "the checksum of optimizer.safetensors does not match" in done.stderr
    assert checkpoints(finished)[:2] == ["damaged-step-00000008", "damaged-step-00000012"]
    assert "Resumed from" in done.stdout
    assert "step-00000004" in done.stdout
    assert metrics(finished) == metrics(unbroken)


def test_a_disk_that_stays_full_ends_the_run_with_5_and_keeps_the_good_one(tmp_path):
    out = tmp_path / "run"
    full = train(out, inject="enospc@checkpoint_write=4-", engine__checkpoint_every=2)
    assert full.returncode == 5, full.stderr
    assert full.stderr.count("No checkpoint at step") == 3
    assert checkpoints(out) == ["step-00000002"]
    assert [line["step"] for line in metrics(out)] == list(range(1, 9))
    assert ending(out)["code"] == 5


def test_a_file_system_that_is_full_for_real(tmp_path):
    """A small tmpfs, mounted where only this run sees it. Two checkpoints fit, a third does not."""
    disk, copy = tmp_path / "disk", tmp_path / "copy"
    disk.mkdir()
    script = f'mount -t tmpfs -o size=5m none {disk} || exit 99; "$@"; code=$?; cp -r {disk}/run {copy}; exit $code'
    under = [*in_a_namespace("--mount"), "sh", "-c", script, "sh"]
    full = train(disk / "run", under=under, engine__checkpoint_every=1, engine__keep_checkpoints=9)
    if full.returncode == 99:
        pytest.skip(f"no tmpfs can be mounted here: {full.stderr.strip()}")
    assert full.returncode == 5, full.stderr
    assert full.stderr.count("No checkpoint at step") == 3
    assert "No space left on device" in full.stderr
    assert "Traceback" not in full.stderr
    kept = checkpoints(copy)
    assert kept
    assert not any(name.startswith(".") for name in kept), "nothing half-written is left"
    for name in kept:
        read_checkpoint(copy / "checkpoints" / name)
    assert ending(copy)["code"] == 5


def test_disks_that_fail_for_a_moment_and_a_clock_that_jumps_are_lived_through(finished, unbroken):
    """One run, longer than the one it continues: rows 11, 13 and 17.

    An input/output error and a stale handle are tried again; a quota costs one checkpoint; an old checkpoint that
    cannot be removed is a warning; the clock jumps back a day; TensorBoard cannot write; there is no network.
    """
    (finished / "tensorboard").write_text("in the way")
    faults = [
        "clock@step=14",
        "eio@checkpoint_write=1",  # the first of three files for step 14
        "estale@checkpoint_write=6",  # of step 16, the second attempt's files included in the count
        "edquot@checkpoint_write=10",  # of step 18
        "eio@prune=1",
    ]
    done = train(
        finished,
        inject=",".join(faults),
        under=in_a_namespace("--net"),
        max_steps=24,
        engine__checkpoint_every=2,
        log__tensorboard="true",
    )
    assert done.returncode == 0, done.stderr
    assert "The checkpoint of step 14 is written again after: Input/output error" in done.stderr
    assert "The checkpoint of step 16 is written again after: Stale file handle" in done.stderr
    assert "No checkpoint at step 18: Disk quota exceeded" in done.stderr
    assert "step-00000004 cannot be removed: Input/output error" in done.stderr
    assert done.stderr.count("ensorBoard") == 1
    assert "Traceback" not in done.stderr
    assert [line["step"] for line in metrics(finished)] == list(range(1, 25))
    assert metrics(finished)[:12] == metrics(unbroken)
    assert all(0 < line["images_per_second"] < 1e6 for line in raw_metrics(finished))
    assert checkpoints(finished) == ["step-00000020", "step-00000022", "step-00000024"]
    assert ending(finished)["code"] == 0


def test_an_incomplete_folder_does_not_count_as_one_of_the_kept(finished):
    incomplete = finished / "checkpoints" / "step-00000009"
    shutil.copytree(finished / "checkpoints" / "step-00000008", incomplete)
    (incomplete / "state.json").unlink()
    done = train(finished, max_steps=13, engine__keep_checkpoints=3)
    assert done.returncode == 0, done.stderr
    whole = [name for name in checkpoints(finished) if (finished / "checkpoints" / name / "state.json").exists()]
    assert whole == ["step-00000008", "step-00000012", "step-00000013"]


def test_a_checkpoint_is_synced_renamed_within_its_folder_and_the_folder_synced(tmp_path, monkeypatch):
    """What a network file system needs, as asked of the operating system."""
    trace, out = tmp_path / "trace", tmp_path / "run"
    monkeypatch.setenv("FILE_TRACE", str(trace))
    done = train(out, module="tests.faults.file_trace", max_steps=1)
    assert done.returncode == 0, done.stderr
    calls = [line.split("\t") for line in trace.read_text().splitlines()]
    (rename,) = [call for call in calls if call[0] == "rename"]
    temporary, final = rename[1:]
    folder = str(out / "checkpoints")
    assert os.path.dirname(temporary) == os.path.dirname(final) == folder
    before, after = calls[: calls.index(rename)], calls[calls.index(rename) + 1 :]
    names = {*os.listdir(final)}
    assert names == {"method.safetensors", "optimizer.safetensors", "state.json"}
    assert {call[1] for call in before if call[0] == "fsync"} >= {f"{temporary}/{name}" for name in names}
    assert before[-1] == ["fsync", temporary], "the last before the rename"
    assert after[0] == ["fsync", folder], "the first after it"
    for call in calls:
        if call[0] == "replace":
            assert os.path.dirname(call[1]) == os.path.dirname(call[2]), "never from another file system"


def test_a_folder_that_cannot_be_written_is_refused_before_the_device_is_touched(tmp_path):
    """The disk is mounted read-only where only this run sees it."""
    script = f'mount -t tmpfs -o ro none {tmp_path} || exit 99; exec "$@"'
    refused = train(tmp_path / "run", under=[*in_a_namespace("--mount"), "sh", "-c", script, "sh"])
    if refused.returncode == 99:
        pytest.skip(f"no tmpfs can be mounted here: {refused.stderr.strip()}")
    assert refused.returncode == 2
    assert refused.stderr == f"error: out: {tmp_path / 'run'} cannot be written (Read-only file system)\n"
    assert refused.stdout == "", "the trainer would have named its device"
