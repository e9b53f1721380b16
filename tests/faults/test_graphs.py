"""Faults under captured steps: rows 1, 18, 20 and 41 of the fault table, on the real command with emulated graphs.

Row 40, inputs and settings that change under a graph, is `tests/engine/test_capture.py`'s: no run of the command does.
"""

import json

import pytest

from tests.faults.command import TOTAL, checkpoints, ending, metrics, train

pytestmark = pytest.mark.slow

# Three eager steps, the fourth is captured while two data workers, the heartbeat of the watchdog and the log live.
GRAPHS = {"module": "tests.faults.with_fake_graphs", "data__workers": 2, "engine__precision": "fp32"}


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """The folder of a run without graphs that nothing happened to; its rates lie on the device too."""
    out = tmp_path_factory.mktemp("eager") / "run"
    done = train(out, engine__graph="off", **GRAPHS)
    assert done.returncode == 0, done.stderr
    return out


def test_stops_while_capturing_and_warming_up_and_a_nan_in_a_replay_leave_the_eager_run(tmp_path, eager):
    out = tmp_path / "run"
    stopped = train(out, inject="sigterm@capture=1", **GRAPHS)
    assert stopped.returncode == 75, stopped.stderr
    assert "is captured as a graph" in stopped.stdout
    assert checkpoints(out) == ["step-00000004"], "the step that was being captured is done and saved"

    stopped = train(out, inject="sigterm@step=6", **GRAPHS)
    assert stopped.returncode == 75, stopped.stderr
    assert "is captured as a graph" not in stopped.stdout, "steps 5 to 7 warm up"
    assert checkpoints(out)[-1] == "step-00000005"

    bad = train(out, inject="nan@loss=11", log__every=6, **GRAPHS)
    assert bad.returncode == 4, bad.stderr
    assert "not finite at step 11" in bad.stderr
    assert "is captured as a graph" in bad.stdout
    assert (ending(out)["code"], json.loads((out / "nonfinite.json").read_text())["step"]) == (4, 11)
    assert checkpoints(out)[-1] == "step-00000008", "the one after it would hold what the bad step did"

    done = train(out, **GRAPHS)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(out)] == [*range(1, 7), *range(9, TOTAL + 1)], "as log.every was then"
    expected = {line["step"]: line for line in metrics(eager)}
    assert all(line == expected[line["step"]] for line in metrics(out))


def test_a_step_that_cannot_be_captured_goes_on_eagerly_and_says_why(tmp_path, eager):
    out = tmp_path / "run"
    done = train(out, inject="raise@capture=1", **GRAPHS)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Steps run without graphs from here on") == 1
    assert metrics(out) == metrics(eager)
