"""`torchrun -m fastmim.train` on several processes does what one process does with the same batch."""

import math

import pytest
import torch
from safetensors.torch import load_file

from fastmim.engine import World
from tests.faults.command import TOTAL, ending, metrics, train

PLAIN = {"model__drop_path_rate": 0.0, "engine__precision": "fp32"}  # what drop-path draws depends on the process
CNN = {
    **PLAIN,
    "model__patch_size": None,
    "model__kwargs": None,
    "method__decoder_depth": None,
    "method__decoder_dim": None,
    "method__decoder_num_heads": None,
    "img_size": 64,
    "max_steps": 4,
    "batch_size": 8,
}
RUNS = {
    "mae": PLAIN,
    "mae-ema-clip": {**PLAIN, "optim__accumulate": 2, "engine__ema": 0.9, "optim__clip_grad_norm": 0.5},
    "mixedae": {**PLAIN, "method": "mixedae"},
    "fcmae": {**CNN, "method": "fcmae", "model": "convnextv2_atto", "method__decoder_dim": 32},
    "a2mim": {**CNN, "method": "a2mim", "model": "resnet18", "engine__sync_bn": True},
    "spark": {**CNN, "method": "spark", "model": "resnet18", "method__decoder_width": 32},
}


def assert_same_course(one, two):
    """To rounding: Adam turns that of a tiny gradient into a step, so not to the last digit."""
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for key in ("loss", "grad_norm", "lr"):
        torch.testing.assert_close(
            torch.tensor([line[key] for line in two]), torch.tensor([line[key] for line in one]), rtol=2e-4, atol=1e-6
        )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run of one process, by name in RUNS; each is trained once."""
    folders = {}

    def run(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("alone") / "run"
            done = train(folders[name], **RUNS[name])
            assert done.returncode == 0, done.stderr
        return folders[name]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, processes",
    [*((name, 2) for name in RUNS), ("mae", 4)],  # four on two cores: shares and ranks beyond a pair
)
def test_several_processes_reproduce_one(tmp_path, alone, name, processes):
    done = train(tmp_path / "run", processes=processes, **RUNS[name])
    assert done.returncode == 0, done.stderr
    assert_same_course(metrics(alone(name)), metrics(tmp_path / "run"))
    log = (tmp_path / "run" / "train.log").read_text()
    batch, accumulate = RUNS[name].get("batch_size", 16), RUNS[name].get("optim__accumulate", 1)
    micro = batch // processes // accumulate
    assert f"{processes} processes x {accumulate} micro-batches x {micro} images are the batch of {batch}" in log
    assert ending(tmp_path / "run")["code"] == 0
    assert not list((tmp_path / "run").glob("previous-*"))
    last = f"checkpoints/step-{RUNS[name].get('max_steps', TOTAL):08d}"
    one, two = (load_file(out / last / "method.safetensors") for out in (alone(name), tmp_path / "run"))
    assert one.keys() == two.keys()
    statistics = [key for key in one if "running_" in key]
    assert bool(statistics) == (name in ("spark", "a2mim"))
    for key in statistics:  # of all processes' images
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-5, msg=key)
    optimizer = [load_file(out / last / "optimizer.safetensors").keys() for out in (alone(name), tmp_path / "run")]
    assert optimizer[0] == optimizer[1], "a parameter without a gradient has no state: nothing decays it"


@pytest.mark.slow
def test_a_run_of_two_goes_on_with_one_and_says_that_rounding_differs(tmp_path, alone):
    out = tmp_path / "run"
    stopped = train(out, processes=2, inject="sigterm@step=7:1", **PLAIN)
    assert "Stopped by SIGTERM after step 6" in stopped.stderr
    done = train(out, **PLAIN)
    assert done.returncode == 0, done.stderr
    assert "processes 2 -> 1" in done.stderr
    assert_same_course(metrics(alone("mae")), metrics(out))


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_answered_in_a_sentence(tmp_path):
    done = train(tmp_path / "run", processes=2, batch_size=15)
    assert "15 is not divisible by 2 processes x 1 micro-batches (optim.accumulate); 14 or 16 would be" in done.stderr
    assert not (tmp_path / "run").exists()


def test_each_process_gets_whole_groups_of_images():
    world = World()
    world.size = 2
    assert world.share(16, 2, group=4) == 4
    with pytest.raises(ValueError, match=r"12 is not divisible by 2 .* x groups of 4 \(method.group_size\); 8 or 16"):
        world.share(12, 1, group=4)


def test_a_world_of_one_answers_by_itself(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with World.from_environment() as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.largest(3) == 3
        assert not world.any(False)
        assert world.sums([1.5]) == [1.5]
        assert world.from_main(lambda: "answer") == "answer"
        assert world.collect([1]) == [[1]]
        assert world.name_lost(RuntimeError("broken")) is None
        assert world.share(12, 3) == 4
    assert not torch.distributed.is_initialized()
    assert math.isclose(float(world.mean(torch.tensor(2.0))), 2.0)


@pytest.mark.parametrize(
    "variables, sentence",
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set; torchrun sets them"),
        ({"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0"}, "must be whole numbers"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK is 2, but there are only 2 processes"),
    ],
)
def test_variables_that_do_not_fit(monkeypatch, variables, sentence):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    if len(variables) > 1:
        variables = {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence):
        World.from_environment()
