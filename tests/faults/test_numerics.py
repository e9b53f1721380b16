"""Rows 18 and 19 of the fault table, on the real command."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.command import checkpoints, ending, metrics, train

pytestmark = pytest.mark.slow


def test_a_nan_loss_ends_with_4_names_the_images_and_a_repeat_goes_on(tmp_path, unbroken):
    out = tmp_path / "run"
    stopped = train(out, inject="nan@loss=7")
    assert stopped.returncode == 4, stopped.stderr
    assert "not finite at step 7" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert ending(out)["code"] == 4
    facts = json.loads((out / "nonfinite.json").read_text())
    assert (facts["step"], facts["seed"], len(facts["indices"])) == (7, 3, 16)
    assert checkpoints(out) == ["step-00000004"]
    assert train(out).returncode == 0
    assert metrics(out) == metrics(unbroken)


def test_nan_gradients_are_skipped_when_asked_to(tmp_path):
    out = tmp_path / "run"
    done = train(out, inject="nan@grad=7", engine__nonfinite="skip")
    assert done.returncode == 0, done.stderr
    assert "Skipped; 1 of at most" in done.stderr
    assert [line.get("skipped_steps", 0) for line in metrics(out)] == [0] * 6 + [1] * 6
    weights = load_file(out / "checkpoints" / "step-00000012" / "method.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
