"""Rows 1 to 4 of the fault table with weights spread over two processes (FSDP) and sharded checkpoints."""

import re
from pathlib import Path

import pytest
import torch

from fastmim.engine.checkpoint import read_checkpoint
from fastmim.evaluation import load_encoder
from fastmim.export import main as export
from tests.faults.command import TOTAL, checkpoints, ending, metrics, train

pytestmark = pytest.mark.slow

FSDP = {"processes": 2, "engine__parallel": "fsdp", "engine__ema": 0.9}
LAST = f"checkpoints/step-{TOTAL:08d}"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder of a run of two processes that nothing happened to."""
    out = tmp_path_factory.mktemp("pair") / "run"
    done = train(out, **FSDP)
    assert done.returncode == 0, done.stderr
    return out


def assert_same_end(one: Path, two: Path) -> None:
    assert metrics(one) == metrics(two)
    a, b = (read_checkpoint(out / LAST).tensors for out in (one, two))
    assert [name for group in a for name in a[group] if not torch.equal(a[group][name], b[group][name])] == []


def test_a_run_ends_with_pictures_and_an_encoder_to_export(pair, tmp_path):
    log = (pair / "train.log").read_text()
    assert "FSDP: 2 blocks are gathered one by one; this process keeps" in log
    assert (pair / "pictures" / f"step-{TOTAL:08d}.png").exists()
    average = read_checkpoint(pair / LAST).group("ema")
    encoder, meta = load_encoder(pair)
    assert (meta.step, meta.averaged) == (TOTAL, True)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, average[f"encoder.{name}"]), name
    export([str(pair), "--out", str(tmp_path)])
    exported, _ = load_encoder(tmp_path)
    assert all(torch.equal(tensor, exported.state_dict()[name]) for name, tensor in encoder.state_dict().items())


def test_sigterm_to_one_rank_saves_the_parts_of_all_and_both_go_on_bit_for_bit(tmp_path, pair):
    out = tmp_path / "run"
    stopped = train(out, inject="sigterm@step=7:1", **FSDP)
    assert set(re.findall(r"exitcode *: (-?\d+)", stopped.stderr)) == {"75"}, stopped.stderr
    assert checkpoints(out) == ["step-00000004", "step-00000006"]
    assert train(out, **FSDP).returncode == 0
    assert_same_end(out, pair)


def test_a_rank_killed_inside_a_save_ends_the_other_and_the_launcher_s_restart_goes_on(tmp_path, pair):
    """Before the second of three files of its second save, that of step 8, which runs beside training."""
    out = tmp_path / "run"
    done = train(out, restarts=1, inject="sigkill@checkpoint_write=5:1", **FSDP)
    assert done.returncode == 0, done.stderr
    log = (out / "train.log").read_text()
    assert re.search(r"exit code 124: The run cannot go on: rank 1 \(process \d+ on .*\) gives no sign of life", log)
    assert "step-00000004" in next(line for line in log.splitlines() if "Resumed from" in line)
    assert checkpoints(out) == ["step-00000004", "step-00000008", f"step-{TOTAL:08d}"], "no temporary folder is left"
    assert ending(out)["code"] == 0
    assert_same_end(out, pair)
