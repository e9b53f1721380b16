"""Settings that cannot be, and runs that go on with others: rows 8, 15, 22, 23 and 43 to 46 of the fault table."""

import os
import subprocess
import sys

import pytest

from tests.faults.command import ROOT, metrics, run, train

pytestmark = pytest.mark.slow


def test_a_changed_setting_is_shown_and_refused_unless_it_is_allowed_by_name(finished):
    before = metrics(finished)
    refused = train(finished, optim__lr=2e-3, seed=4, max_steps=14)
    assert refused.returncode == 2
    assert "  optim.lr: 0.001 -> 0.002\n" in refused.stderr
    assert "  seed: 3 -> 4\n" in refused.stderr
    assert "max_steps: 12 -> 14" not in refused.stderr, "that may change"
    assert "What may change: epochs, max_steps," in refused.stderr
    assert "--resume_allow KEY,KEY" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert metrics(finished) == before
    half = train(finished, optim__lr=2e-3, seed=4, max_steps=14, resume_allow="optim")
    assert (half.returncode, "optim.lr" in half.stderr, "seed: 3 -> 4" in half.stderr) == (2, False, True)

    allowed = train(finished, optim__lr=2e-3, seed=4, max_steps=14, resume_allow="optim.lr,seed")
    assert allowed.returncode == 0, allowed.stderr
    for line in ("optim.lr: 0.001 -> 0.002", "seed: 3 -> 4", "max_steps: 12 -> 14"):
        assert f"changed since then: {line}" in allowed.stdout
    assert "may not repeat exactly" in allowed.stderr
    assert metrics(finished)[:12] == before
    assert [line["step"] for line in metrics(finished)] == list(range(1, 15))
    assert train(finished, optim__lr=2e-3, seed=4, max_steps=15).returncode == 0, "from now on it is this run's own"


REFUSED = {
    "an unknown key": ("--model.drop_path_rat 0.1", "model.drop_path_rat: ", "did you mean model.drop_path_rate?"),
    "a wrong type": ("--optim.lr fast", "optim.lr: 'fast' is not a number"),
    "out of range": ("--engine.ema 1.5", "engine.ema must lie in [0, 1), got 1.5"),
    "nothing visible": ("--method.mask_ratio 1", "method.mask_ratio: 1 is not between 0 and 1"),
    "nothing to predict": ("--method.mask_ratio 0", "method.mask_ratio: 0 is not between 0 and 1"),
    "a conflict": ("--epochs 3 --max_steps 5", "epochs: 3 conflicts with max_steps 5; give one of the two"),
    "fp16": ("--engine.precision fp16", "engine.precision: 'fp16' is not one of auto, fp32, bf16"),
    "no such data": ("--data.root /no/such/folder", "data.root: /no/such/folder does not exist"),
    "a name that climbs": ("--out runs/../../elsewhere", "out: runs/../../elsewhere has '..' in it"),
    "a recipe that climbs": ("--recipe ../../secrets", "there is no recipe '../../secrets'"),
    "a model that climbs": ("--model ../../elsewhere", "../../elsewhere"),
    "a permission for nothing": ("--resume_allow optim.lrr", "there is no setting 'optim.lrr'; did you mean optim.lr?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_sentence_and_exit_code_2_before_a_device_is_touched(case, tmp_path):
    words, *parts = REFUSED[case]
    # Where CUDA were touched, this list of devices would be an error of its own.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "nonsense"}
    command = [sys.executable, "-m", "fastmim.train", *words.split()]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert all(part in done.stderr for part in parts), done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_a_warm_up_longer_than_the_run_is_shortened_and_that_is_said(tmp_path):
    done = train(tmp_path / "run", optim__warmup_steps=50, max_steps=4)
    assert done.returncode == 0, done.stderr
    assert "Warm-up" in done.stderr
    assert metrics(tmp_path / "run")[-1]["lr"] > 0


def test_yaml_that_would_build_an_object_is_refused(tmp_path):
    evil = tmp_path / "evil.yaml"
    evil.write_text(f"seed: !!python/object/apply:os.mkdir ['{tmp_path}/executed']\n")
    done = run("fastmim.train", "--config", evil, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "refused, it asks for more than plain values" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.yaml"]


@pytest.mark.parametrize("words", [["--help"], ["--print_config"], ["--dry_run"]], ids=lambda words: words[0])
def test_help_configuration_and_rehearsal_take_less_than_two_seconds(words, tmp_path):
    """Of processor time, half of which torch's import may take; where that takes longer just now, in proportion."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def seconds(*command):
        before = children_used()
        done = subprocess.run(
            [sys.executable, *command], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return children_used() - before, done.stdout

    for _ in range(3):  # the first time, files are read from disk
        taken, output = seconds("-m", "fastmim.train", *words)
        assert output
        allowed = 2.0 if taken < 2 else 2 * max(1.0, seconds("-c", "import torch")[0])
        if taken < allowed:
            break
    assert taken < allowed
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def children_used() -> float:
    """Seconds of processor time of all processes that this one started and that ended."""
    times = os.times()
    return times.children_user + times.children_system
