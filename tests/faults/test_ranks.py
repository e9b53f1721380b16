"""Several processes: rows 1, 4, 5 and 18 of the fault table, under the real torchrun."""

import json
import os
import re
import signal
import time

import pytest
import torch

from fastmim.engine.checkpoint import read_checkpoint
from tests.faults.command import TOTAL, checkpoints, ending, metrics, start, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of a run of two processes that nothing happened to."""
    out = tmp_path_factory.mktemp("pair") / "run"
    done = train(out, processes=2)
    assert done.returncode == 0, done.stderr
    return out


def assert_same_weights(one, two):
    a, b = (read_checkpoint(out / "checkpoints" / f"step-{TOTAL:08d}").tensors for out in (one, two))
    assert [name for group in a for name in a[group] if not torch.equal(a[group][name], b[group][name])] == []


def test_sigterm_to_one_rank_stops_all_at_the_same_step_and_both_go_on_bit_for_bit(tmp_path, pair):
    out = tmp_path / "run"
    stopped = train(out, processes=2, inject="sigterm@step=7:1")
    assert set(re.findall(r"exitcode *: (-?\d+)", stopped.stderr)) == {"75"}, stopped.stderr
    assert checkpoints(out) == ["step-00000004", "step-00000006"]
    assert ending(out)["code"] == 75
    assert train(out, processes=2).returncode == 0
    assert metrics(out) == metrics(pair)
    assert_same_weights(out, pair)


def test_ctrl_c_on_the_launcher_saves_and_ends_all(tmp_path):
    out = tmp_path / "run"
    process = start(out, processes=2, max_steps=100_000, engine__checkpoint_every=0)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not ((out / "metrics.jsonl").exists() and metrics(out)):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the launcher and every process
    _, errors = process.communicate(timeout=120)
    assert ending(out)["code"] == 130, errors
    assert len(checkpoints(out)) == 1
    read_checkpoint(out / "checkpoints" / checkpoints(out)[0])


@pytest.mark.parametrize("where", ["loss", "grad"])
def test_nan_on_one_rank_stops_all_before_a_weight_changes(tmp_path, where):
    out = tmp_path / "run"
    # A checkpoint after the bad step would show what it did; the run has to end with the one before it.
    stopped = train(out, processes=2, inject=f"nan@{where}=5:1", log__every=1)
    assert set(re.findall(r"exitcode *: (-?\d+)", stopped.stderr)) == {"4"}, stopped.stderr
    assert ending(out)["code"] == 4
    assert "step 5" in ending(out)["reason"]
    assert checkpoints(out) == ["step-00000004"]
    facts = json.loads((out / "nonfinite.json").read_text())
    assert len(facts["indices"]) == 16, "of both ranks"


def test_a_skipped_step_changes_nothing_in_any_rank(tmp_path):
    """With every step bad on one rank, nothing ever changes: the weights of step 4 are those of step 8."""
    out = tmp_path / "run"
    done = train(
        out, processes=2, inject="nan@loss=5-8:1", max_steps=8, engine__nonfinite="skip", engine__checkpoint_every=4
    )
    assert done.returncode == 0, done.stderr
    before, after = (read_checkpoint(out / "checkpoints" / f"step-{step:08d}").tensors for step in (4, 8))
    for group in before:
        assert [name for name in before[group] if not torch.equal(before[group][name], after[group][name])] == []
    assert "4 of at most 20" in done.stderr


def test_a_killed_rank_ends_the_others_by_name_and_the_launcher_s_restart_goes_on(tmp_path, pair):
    out = tmp_path / "run"
    began = time.monotonic()
    done = train(out, processes=2, restarts=1, inject="sigkill@step=7:1")
    assert done.returncode == 0, done.stderr
    assert re.search(r"rank 1 \(process \d+ on .*\) gives no sign of life", done.stderr)
    assert time.monotonic() - began < 100, "well within engine.timeout, which is ten minutes"
    log = (out / "train.log").read_text()
    assert "exit code 124: The run cannot go on: rank 1" in log
    assert "Resumed from" in log
    assert ending(out)["code"] == 0
    assert metrics(out) == metrics(pair)
    assert_same_weights(out, pair)


def test_an_error_of_one_rank_ends_the_others_with_its_reason(tmp_path):
    out = tmp_path / "run"
    done = train(out, processes=2, inject="raise@step=7:1")
    assert done.returncode == 1
    log = (out / "train.log").read_text()
    assert "ERROR rank 1: injected at step" in log
    assert "ended with exit code 1: injected at step" in log
    assert ending(out)["code"] == 124
