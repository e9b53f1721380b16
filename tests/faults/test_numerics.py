"""Numbers that go wrong: rows 18, 19, 21, 23 and 24 of the fault table, on the real command."""

import json
import math

import pytest
import torch
from PIL import Image
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


def test_a_loss_that_leaps_is_told_once_and_counted_in_the_metrics_also_after_a_kill(tmp_path):
    out = tmp_path / "run"
    faults = "spike@loss=7-8,sigkill@step=11"
    assert train(out, inject=faults).returncode < 0
    done = train(out)
    assert done.returncode == 0, done.stderr
    lines = metrics(out)
    assert [line.get("loss_spikes", 0) for line in lines] == [0] * 6 + [1] + [2] * 5
    assert lines[6]["loss"] > 100 * lines[5]["loss"]
    log = (out / "train.log").read_text()
    assert log.count("times") == 1
    assert "at step 7 is " in log


def test_constant_images_and_a_single_visible_patch_are_finite(tmp_path):
    """Rows 23 and 24: the variance of a patch is 0, 15 of 16 patches are removed, and there are fewer images than a
    batch takes."""
    folder = tmp_path / "images"
    folder.mkdir()
    for level in range(0, 256, 51):
        Image.new("RGB", (40, 40), (level, level, level)).save(folder / f"{level}.png")
    done = train(
        tmp_path / "run",
        data__root=folder,
        img_size=32,
        method__mask_ratio=15 / 16,
        method__norm_pix_loss="true",
        max_steps=4,
    )
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path / "run")
    assert len(lines) == 4
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
