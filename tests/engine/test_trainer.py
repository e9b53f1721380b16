import json

import pytest
import torch
from PIL import Image

from fastmim.engine import CheckpointError, DiskFullError, FitResult, NonFiniteError, RunFolder
from fastmim.engine import checkpoint as checkpoint_module
from fastmim.engine import step as step_module
from fastmim.engine.checkpoint import read_checkpoint
from tests.engine.tiny_run import BATCH, DrawnLoader, TinyMethod, read_metrics, tiny_run, tiny_trainer

NAN = float("nan")


def weights(out, step):
    found = read_checkpoint(out / "checkpoints" / f"step-{step:08d}").tensors
    return {f"{group}/{name}": tensor for group, tensors in found.items() for name, tensor in tensors.items()}


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_a_run_leaves_all_that_the_folder_promises(tmp_path):
    result = tiny_run(tmp_path, log={"pictures_every": 6, "tensorboard": True})
    assert (result.step, result.steps, result.images, result.resumed_from) == (12, 12, 12 * BATCH, 0)
    assert result.images_per_second == pytest.approx(result.images / result.seconds)
    assert 0 <= result.data_wait < 1
    assert result.checkpoint.name == "step-00000012"
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert set(lines[0]) == {"step", "epoch", "loss", "twice", "lr", "grad_norm", "replaced_images"}
    assert lines[-1]["loss"] == result.last_loss
    assert lines[-1]["twice"] == pytest.approx(2 * result.last_loss)
    assert result.first_values == {name: lines[0][name] for name in ("loss", "twice")}
    assert result.last_values == {name: lines[-1][name] for name in ("loss", "twice")}
    assert (lines[0]["lr"], lines[3]["lr"]) == (0.0, pytest.approx(0.01))
    assert lines[-1]["replaced_images"] == 1
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["step-00000006.png", "step-00000012.png"]
    Image.open(result.picture).verify()
    assert list((tmp_path / "tensorboard").iterdir())
    state = json.loads((result.checkpoint / "state.json").read_text())
    assert state["meta"] == {"method": "tiny"}


def test_the_loss_falls(tmp_path):
    class Bright(DrawnLoader):
        def __next__(self):
            batch = super().__next__()
            batch.images = 0.1 * batch.images + 1
            return batch

    tiny_run(tmp_path, total=60, loader=Bright, engine={"checkpoint_every": 0})
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"engine": {"ema": 0.9, "precision": "bf16"}},
        {"optim": {"accumulate": 2, "clip_grad_norm": 0.1}},
        {"optim": {"clip_grad_norm": 0.1, "clip_mode": "per_tensor"}, "engine": {"nonfinite": "skip"}},
    ],
    ids=["plain", "ema-bf16", "accumulate-clip", "per-tensor-skip"],
)
def test_resuming_is_bitwise_the_unbroken_run(tmp_path, settings, monkeypatch):
    tiny_run(tmp_path / "whole", **settings)

    class Stop(Exception):
        pass

    def stop(where, number):
        if where == "step" and number == 8:
            raise Stop

    monkeypatch.setattr("fastmim.engine.trainer.inject", stop)
    with pytest.raises(Stop):
        tiny_run(tmp_path / "broken", **settings)
    monkeypatch.undo()
    assert [line["step"] for line in read_metrics(tmp_path / "broken")] == list(range(1, 8))
    result = tiny_run(tmp_path / "broken", seed=0, **settings)
    assert (result.resumed_from, result.steps) == (4, 8)
    assert read_metrics(tmp_path / "broken") == read_metrics(tmp_path / "whole")
    assert_same(weights(tmp_path / "broken", 12), weights(tmp_path / "whole", 12))


def test_the_same_seed_gives_the_same_losses_and_another_does_not(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tiny_run(tmp_path / name, total=4, seed=seed)
    assert read_metrics(tmp_path / "a") == read_metrics(tmp_path / "b")
    assert read_metrics(tmp_path / "a") != read_metrics(tmp_path / "c")


def test_the_course_of_a_run_is_told_in_a_line():
    first, last = {"loss": 1.23456, "chance": 0.25}, {"loss": 0.5, "chance": 0.25}
    result = FitResult(step=9, first_values=first, last_values=last)
    assert result.course() == "loss 1.23 -> 0.5, chance 0.25"


def test_a_complete_run_has_nothing_left_to_do(tmp_path):
    tiny_run(tmp_path)
    again = tiny_run(tmp_path)
    assert (again.step, again.steps, again.last_loss) == (12, 0, None)
    assert again.checkpoint.name == "step-00000012"
    assert again.picture.name == "step-00000012.png"
    longer = tiny_run(tmp_path, total=15)
    assert (longer.resumed_from, longer.step) == (12, 15)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 16))


def test_never_starts_anew(tmp_path):
    tiny_run(tmp_path)
    first = read_metrics(tmp_path)
    result = tiny_run(tmp_path, resume="never")
    assert (result.resumed_from, result.steps) == (0, 12)
    assert read_metrics(tmp_path) == first


def test_an_older_checkpoint_by_path(tmp_path):
    tiny_run(tmp_path)
    first = read_metrics(tmp_path)
    result = tiny_run(tmp_path, resume=str(tmp_path / "checkpoints" / "step-00000008"))
    assert (result.resumed_from, result.steps) == (8, 4)
    assert read_metrics(tmp_path) == first
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000008", "step-00000012", "superseded-step-00000012"]


def test_another_run_s_checkpoint_by_path(tmp_path):
    tiny_run(tmp_path / "a", total=4)
    result = tiny_run(tmp_path / "b", resume=str(tmp_path / "a"))
    assert (result.resumed_from, result.steps) == (4, 8)


def test_a_checkpoint_of_another_method_is_refused_before_anything_is_touched(tmp_path):
    tiny_run(tmp_path)
    method = TinyMethod(channels=1)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    with RunFolder(tmp_path) as run, pytest.raises(CheckpointError, match=r"encoder\.embed\.weight is \[24, 48\]"):
        tiny_trainer(run, method=method)
    assert_same(before, method.state_dict())


def test_a_shorter_run_than_the_checkpoint_is_refused(tmp_path):
    tiny_run(tmp_path)
    with pytest.raises(CheckpointError, match="step 12, beyond this run's 6"):
        tiny_run(tmp_path, total=6)


def test_changed_facts_are_told(tmp_path, capsys):
    tiny_run(tmp_path, total=4)
    tiny_run(tmp_path, total=8, engine={"precision": "bf16"})
    assert "total_steps 4 -> 8; precision fp32 -> bf16" in capsys.readouterr().err


def test_uint8_batches_are_normalised_here(tmp_path):
    tiny_run(tmp_path, total=2, loader=lambda step: DrawnLoader(step, uint8=True))
    losses = [line["loss"] for line in read_metrics(tmp_path)]
    assert all(0 < loss < 10 for loss in losses)


@pytest.mark.parametrize("channels", [1, 13])
def test_any_number_of_channels(tmp_path, channels):
    result = tiny_run(tmp_path, total=2, channels=channels, loader=lambda step: DrawnLoader(step, channels))
    assert result.picture.exists()


def test_the_loader_is_closed_whatever_happens(tmp_path):
    loaders = []

    class Failing(DrawnLoader):
        def __next__(self):
            if self.step == 3:
                raise RuntimeError("disk on fire")
            return super().__next__()

    def make(step):
        loaders.append(Failing(step))
        return loaders[-1]

    with pytest.raises(RuntimeError, match="on fire"):
        tiny_run(tmp_path, loader=make)
    assert loaders[0].closed


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not divisible by optim\.accumulate 3"):
        tiny_run(tmp_path, optim={"accumulate": 3})


@pytest.mark.parametrize("where", ["loss", "grad"])
@pytest.mark.parametrize("every", [1, 5])
def test_non_finite_stops_names_the_images_and_keeps_the_checkpoint(tmp_path, monkeypatch, where, every):
    monkeypatch.setattr(step_module, "injecting", lambda: True)
    monkeypatch.setattr(step_module, "inject", lambda place, n: NAN if (place, n) == (where, 7) else 1.0)
    with pytest.raises(NonFiniteError, match="step 7") as caught:
        tiny_run(tmp_path, log={"every": every})
    assert caught.value.code == 4
    facts = json.loads((tmp_path / "nonfinite.json").read_text())
    loader = DrawnLoader(6)
    assert facts["indices"] == next(loader).indices.tolist()
    assert facts["step"] == 7
    if where == "grad":
        assert len(facts["parameters"]) == 1
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004"]
    monkeypatch.undo()
    assert tiny_run(tmp_path).step == 12


def test_skipping_goes_on_until_the_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(step_module, "injecting", lambda: True)
    monkeypatch.setattr(step_module, "inject", lambda place, n: NAN if place == "loss" and n in (3, 6, 9) else 1.0)
    result = tiny_run(tmp_path / "a", engine={"nonfinite": "skip", "max_skips": 3})
    assert result.skipped == 3
    assert read_metrics(tmp_path / "a")[-1]["skipped_steps"] == 3
    assert read_metrics(tmp_path / "a")[2]["loss"] is None
    with pytest.raises(NonFiniteError, match="max_skips allows 2"):
        tiny_run(tmp_path / "b", engine={"nonfinite": "skip", "max_skips": 2})


def test_a_full_disk_is_an_error_line_then_the_end(tmp_path, monkeypatch, capsys):
    def full(where):
        raise OSError(28, "No space left on device")

    tiny_run(tmp_path, total=4)
    monkeypatch.setattr(checkpoint_module, "inject", full)
    with pytest.raises(DiskFullError, match="step-00000004") as caught:
        tiny_run(tmp_path, total=40)
    assert caught.value.code == 5
    assert capsys.readouterr().err.count("No checkpoint at step") == 3
    assert read_metrics(tmp_path)[-1]["step"] == 16
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000004"]


@pytest.mark.parametrize("number, lost", [(5, False), (28, True)])
def test_a_disk_that_recovers_costs_at_most_one_checkpoint(tmp_path, monkeypatch, number, lost):
    calls = []

    def once(where):
        calls.append(where)
        if len(calls) == 1:
            raise OSError(number, "injected")

    monkeypatch.setattr(checkpoint_module, "inject", once)
    assert tiny_run(tmp_path).checkpoint.name == "step-00000012"
    names = [f"step-{step:08d}" for step in (4, 8, 12)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names[lost:]
