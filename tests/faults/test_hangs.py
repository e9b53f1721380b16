"""Runs that make no progress: row 10 of the fault table, on the real command."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.command import checkpoints, ending, metrics, start, train

pytestmark = pytest.mark.slow


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_there(pid: int) -> bool:
    """Not counting a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_loader_that_stalls_ends_with_124_and_all_stacks_and_a_repeat_goes_on(tmp_path, unbroken):
    """A data worker is stopped, as one is that reads from a dead network disk."""
    out = tmp_path / "run"
    process = start(out, data__workers=2, max_steps=100_000, engine__checkpoint_every=20, engine__watchdog=5)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not ((out / "checkpoints").is_dir() and checkpoints(out)):
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGSTOP)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 124, errors
    assert "No progress for 5 s (waiting for images, step" in errors
    assert "Traceback" not in errors
    log = (out / "train.log").read_text()
    for function in ("in fit\n", "in _receive\n", "in _watch\n"):  # of the training thread, and of another
        assert function in log
    assert (ending(out)["code"], "waiting for images" in ending(out)["reason"]) == (124, True)
    assert not any(map(is_there, workers))
    saved = int(checkpoints(out)[-1].removeprefix("step-"))
    assert train(out, max_steps=saved + 4, data__workers=0, engine__checkpoint_every=20).returncode == 0
    steps = [line["step"] for line in metrics(out)]
    assert steps == list(range(1, saved + 5)), "each once"


def test_a_rank_that_lives_and_hangs_is_told_by_what_it_does_and_ends_itself(tmp_path):
    """Its heart beats on; the other one's collective times out, and says where everybody is."""
    out = tmp_path / "run"
    done = train(out, processes=2, inject="stall@loader=6:1", engine__timeout=8, engine__watchdog=14)
    assert done.returncode == 1, "the launcher's"
    assert "rank 0 (process" in done.stderr
    assert "is training, step 6" in done.stderr
    assert "is waiting for images, step 6" in done.stderr
    assert ending(out)["code"] == 124
    assert "after 8 s (engine.timeout) some process has not answered, though all live" in ending(out)["reason"]
    log = (out / "train.log").read_text()
    assert "rank 1: No progress for 14 s (waiting for images, step 6" in log
    assert "in _happen" in log, "the stack of the thread that stalls"
    assert checkpoints(out) == ["step-00000004"]
