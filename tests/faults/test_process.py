"""Kills and signals: rows 1, 2, 3, 6, 7, 9 and 11 of the fault table, on the real command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastmim.engine import RunFolder
from tests.faults.command import TOTAL, checkpoints, ending, metrics, start, train

pytestmark = pytest.mark.slow


def assert_same_weights(one: Path, two: Path) -> None:
    for file in ("method.safetensors", "optimizer.safetensors"):
        a, b = (load_file(out / "checkpoints" / f"step-{TOTAL:08d}" / file) for out in (one, two))
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_kills_in_a_step_in_a_save_and_before_its_rename_leave_the_unbroken_run(tmp_path, unbroken):
    out = tmp_path / "run"
    assert train(out, inject="sigkill@step=7").returncode == -signal.SIGKILL
    assert [line["step"] for line in metrics(out)] == list(range(1, 7))
    assert checkpoints(out) == ["step-00000004"]

    assert train(out, inject="sigkill@checkpoint_write=2").returncode == -signal.SIGKILL
    assert len(checkpoints(out)) == 2, "the old one, and a half one under a temporary name"
    assert train(out, inject="sigkill@rename=1").returncode == -signal.SIGKILL
    assert "step-00000004" in checkpoints(out)
    assert "step-00000008" not in checkpoints(out)

    done = train(out)
    assert done.returncode == 0, done.stderr
    assert checkpoints(out) == ["step-00000004", "step-00000008", "step-00000012"]
    assert metrics(out) == metrics(unbroken)
    assert_same_weights(out, unbroken)
    assert (out / "train.log").read_text().count("which ended without releasing it, is taken over") == 3


def test_sigterm_while_the_encoder_is_measured_ends_with_75_and_nothing_is_lost(finished, unbroken):
    """Before training, and after it: then all is saved, and a repeat only measures."""
    for times, number in enumerate((1, 2), 1):
        stopped = train(finished, evaluate="true", max_steps=13, inject=f"sigterm@eval={number}")
        assert stopped.returncode == 75, stopped.stderr
        assert "Stopped by SIGTERM" in stopped.stderr
        assert "Traceback" not in stopped.stderr
        assert ending(finished)["code"] == 75
        assert len(metrics(finished)) == 11 + times
    assert checkpoints(finished)[-1] == "step-00000013"
    done = train(finished, evaluate="true", max_steps=13)
    assert done.returncode == 0, done.stderr
    assert "nothing is left to train" in done.stdout
    assert "knn" in done.stdout
    assert metrics(finished)[:12] == metrics(unbroken)


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path, unbroken):
    out = tmp_path / "run"
    stopped = train(out, inject="sigterm@step=7")
    assert stopped.returncode == 75, stopped.stderr
    assert checkpoints(out) == ["step-00000004", "step-00000006"]
    assert ending(out)["code"] == 75
    assert "SIGTERM" in ending(out)["reason"]
    assert "Traceback" not in stopped.stderr

    assert train(out).returncode == 0
    assert metrics(out) == metrics(unbroken)
    assert_same_weights(out, unbroken)


def test_ctrl_c_on_a_terminal_saves_and_ends_without_a_traceback(tmp_path, jpeg_folder):
    """A terminal sends it to the whole process group: the loader's workers too."""
    out = tmp_path / "run"
    process = start(
        out, data__root=jpeg_folder, data__workers=2, img_size=32, max_steps=100_000, engine__checkpoint_every=0
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out.is_dir() and any(out.glob("metrics.jsonl")) and metrics(out)):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert len(checkpoints(out)) == 1
    assert ending(out)["code"] == 130
    assert "Traceback" not in output + errors
    assert "--resume auto" in output + errors


def test_a_second_signal_ends_a_run_that_does_not_come_to_its_stop(tmp_path):
    out = tmp_path / "run"
    process = start(out, inject="stall@loader=6")
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not ((out / "metrics.jsonl").is_file() and len(metrics(out)) == 5):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 75
    finally:
        process.kill()
        process.communicate()
    assert checkpoints(out) == ["step-00000004"]
    assert train(out).returncode == 0


def test_a_second_run_on_the_folder_exits_2(tmp_path):
    with RunFolder(tmp_path / "run"):
        second = train(tmp_path / "run")
    assert second.returncode == 2
    assert "is in use by process" in second.stderr
    assert "Traceback" not in second.stderr


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    process = start(tmp_path / "run", log__progress="plain")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert ending(tmp_path / "run")["code"] == 0


@pytest.mark.parametrize("form, rounds", [("plain", 50), ("sharded", 20)])
def test_kills_at_random_moments_always_leave_a_whole_checkpoint(tmp_path, form, rounds):
    """Row 2, on runs that save after each step, so that many kills fall into a save."""
    command = [sys.executable, "-m", "tests.faults.random_kills", str(tmp_path), form, str(rounds)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{rounds} kills" in done.stdout
