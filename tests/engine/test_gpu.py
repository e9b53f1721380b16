"""What only a GPU can show: a step that never waits for the host, and a finite check that is late without harm."""

import json

import pytest
import torch

from fastmim.data import RawBatch
from fastmim.engine import NonFiniteError, OptimConfig
from fastmim.engine import step as step_module
from fastmim.engine.checkpoint import read_checkpoint
from fastmim.engine.ema import Ema
from fastmim.engine.inputs import ToDevice
from fastmim.engine.optimizer import create_optimizer, set_lr
from fastmim.engine.step import TrainStep
from tests.engine.tiny_run import BATCH, SIZE, DrawnLoader, TinyMethod, read_metrics, tiny_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("clip_mode", ["global", "per_tensor"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_waits_for_the_host(clip_mode, precision):
    device = torch.device("cuda", 0)
    method = TinyMethod().to(device)
    optim = OptimConfig(lr=0.01, accumulate=2, clip_grad_norm=1.0, clip_mode=clip_mode)
    optimizer = create_optimizer(method, optim)
    ema = Ema(method, 0.9)
    step = TrainStep(
        method,
        optimizer,
        optim,
        precision=precision,
        device=device,
        seed=0,
        micro_batch=BATCH // 2,
        stop=False,
        ema=ema,
    )
    images = torch.randn(BATCH, 3, SIZE, SIZE, device=device)
    try:
        for number in range(4):
            torch.cuda.set_sync_debug_mode("error" if number >= 2 else "default")
            set_lr(optimizer, 0.01 * number)
            step(images, None, None, number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(step.bad_steps) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_moving_a_batch_to_the_device_never_waits_for_it(dtype):
    device = torch.device("cuda", 0)
    to_device = ToDevice(device, [0.5] * 3, [0.25] * 3)
    raw = RawBatch(
        torch.randint(256, (BATCH, 3, SIZE, SIZE)).to(dtype), torch.arange(BATCH), torch.arange(BATCH), 0, {}
    )
    to_device(raw)
    try:
        torch.cuda.set_sync_debug_mode("error")
        moved = to_device(raw)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = (raw.images / 255 - 0.5) / 0.25 if dtype == torch.uint8 else raw.images
    torch.testing.assert_close(moved.images.cpu(), expected)
    assert moved.labels.tolist() == list(range(BATCH))


def test_a_late_look_still_finds_weights_as_they_were(tmp_path, monkeypatch):
    gpu = {"device": "cuda", "precision": "fp32"}
    tiny_run(tmp_path / "whole", total=6, engine={**gpu, "checkpoint_every": 6}, optim={"schedule": "constant"})
    monkeypatch.setattr(step_module, "injecting", lambda: True)
    monkeypatch.setattr(step_module, "inject", lambda place, n: float("nan") if (place, n) == ("loss", 7) else 1.0)
    torch.manual_seed(0)
    method = TinyMethod()
    with pytest.raises(NonFiniteError, match="step 7"):
        tiny_run(
            tmp_path / "bad",
            total=12,
            method=method,
            engine={**gpu, "checkpoint_every": 0},
            optim={"schedule": "constant"},
            log={"every": 10},
        )
    facts = json.loads((tmp_path / "bad" / "nonfinite.json").read_text())
    assert (facts["step"], facts["indices"]) == (7, next(DrawnLoader(6)).indices.tolist())
    saved = read_checkpoint(tmp_path / "whole" / "checkpoints" / "step-00000006").tensors["method"]
    for name, parameter in method.named_parameters():  # three more steps were done; none of them counted
        torch.testing.assert_close(parameter.cpu(), saved[name], msg=name, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_steps_train_like_eager_ones(tmp_path, precision):
    for graph in ("off", "on"):
        torch.manual_seed(0)
        tiny_run(tmp_path / graph, total=20, engine={"device": "cuda", "precision": precision, "graph": graph})
    losses = [[line["loss"] for line in read_metrics(tmp_path / graph)] for graph in ("off", "on")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(set(losses[1])) == 20


def test_gpu_and_cpu_train_alike(tmp_path):
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        method = TinyMethod()
        method.encoder.drop.p = 0.0  # torch draws dropout differently there; masks are the same
        tiny_run(tmp_path / device, method=method, engine={"device": device})
    losses = [[line["loss"] for line in read_metrics(tmp_path / device)] for device in ("cpu", "cuda")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_resuming_on_a_gpu_goes_on_where_it_stood(tmp_path):
    for total in (12, 4):
        tiny_run(tmp_path / str(total), total=total, engine={"device": "cuda"}, optim={"schedule": "constant"})
    result = tiny_run(tmp_path / "4", total=12, engine={"device": "cuda"}, optim={"schedule": "constant"})
    assert result.resumed_from == 4
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("4", "12")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
