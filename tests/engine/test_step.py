"""One step: clipping, accumulation, the finite check, EMA."""

import copy

import pytest
import torch

from fastmim.engine import step as step_module
from fastmim.engine.clipping import clip_gradients, gradient_norms
from fastmim.engine.ema import Ema
from fastmim.engine.optimizer import create_optimizer, optimizer_state, set_lr
from fastmim.engine.settings import OptimConfig
from fastmim.engine.step import TrainStep
from tests.engine.tiny_run import BATCH, SIZE, TinyMethod

NAN = float("nan")


def images(seed=0):
    return torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def train_step(method, *, stop=True, ema=None, precision="fp32", **optim):
    settings = OptimConfig(**{"lr": 0.01, **optim})
    optimizer = create_optimizer(method, settings)
    set_lr(optimizer, 0.01)
    return TrainStep(
        method,
        optimizer,
        settings,
        precision=precision,
        device=torch.device("cpu"),
        seed=7,
        micro_batch=BATCH // settings.accumulate,
        stop=stop,
        ema=ema,
    )


def snapshot(step):
    state = {**step.method.state_dict(), **optimizer_state(step.optimizer)}
    return {name: tensor.clone() for name, tensor in state.items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def fault(monkeypatch):
    """fault("loss", 2): NaN into the loss of step 2 (counted from 1)."""

    def set_fault(where, number):
        monkeypatch.setattr(step_module, "inject", lambda place, n: NAN if (place, n) == (where, number) else 1.0)

    monkeypatch.setattr(step_module, "injecting", lambda: True)
    return set_fault


def test_global_clipping_bounds_the_norm_of_all():
    gradients = [torch.full((4,), 3.0), torch.full((9,), 4.0)]
    norms, total = gradient_norms(gradients)
    assert [float(n) for n in norms] == [6.0, 12.0]
    clip_gradients(gradients, norms, total, 1.0, "global")
    assert float(gradient_norms(gradients)[1]) == pytest.approx(1.0, rel=1e-5)
    assert float(gradients[0][0] / gradients[1][0]) == pytest.approx(0.75)


def test_per_tensor_clipping_bounds_each_and_leaves_small_ones():
    gradients = [torch.full((4,), 3.0), torch.full((4,), 0.1)]
    clip_gradients(gradients, *gradient_norms(gradients), 1.0, "per_tensor")
    assert [float(n) for n in gradient_norms(gradients)[0]] == pytest.approx([1.0, 0.2], rel=1e-5)


def test_micro_batches_give_the_step_of_the_whole_batch():
    whole, parts = TinyMethod(norm=False), TinyMethod(norm=False)
    parts.load_state_dict(whole.state_dict())
    for method in (whole, parts):
        method.encoder.drop.p = 0.0
    one, many = train_step(whole), train_step(parts, accumulate=4)
    out, outs = one(images(), None, None, 3), many(images(), None, None, 3)
    assert [int(rng[2]) for rng in parts.seen] == [0, 2, 4, 6]  # so each draws the masks of its place in the batch
    torch.testing.assert_close(outs.loss, out.loss)
    torch.testing.assert_close(outs.parts["twice"], out.parts["twice"])
    torch.testing.assert_close(outs.grad_norm, out.grad_norm)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, msg=name, rtol=1e-4, atol=1e-5)


def test_rng_is_seed_step_first():
    method = TinyMethod()
    step = train_step(method)
    for i in (0, 1, 5):
        step(images(), None, None, i)
    assert [rng.tolist() for rng in method.seen] == [[7, 0, 0], [7, 1, 0], [7, 5, 0]]
    assert [int(step) for step in method.steps] == [0, 1, 5]


@pytest.mark.parametrize("where", ["loss", "grad"])
def test_a_non_finite_step_changes_nothing_and_with_stop_neither_do_later_ones(where, fault):
    step = train_step(TinyMethod(norm=False), clip_grad_norm=1.0)
    step(images(), None, None, 0)
    before = snapshot(step)
    fault(where, 2)
    step(images(), None, None, 1)
    assert same(before, snapshot(step))
    assert (int(step.bad_steps), int(step.first_bad)) == (1, 1)
    step(images(), None, None, 2)
    assert same(before, snapshot(step))
    assert (int(step.bad_steps), int(step.first_bad)) == (1, 1)


@pytest.mark.parametrize("where", ["loss", "grad"])
def test_a_skipped_step_leaves_no_trace_and_training_goes_on(where, fault):
    step = train_step(TinyMethod(), stop=False)
    step(images(), None, None, 0)
    before = snapshot(step)
    fault(where, 2)
    step(images(1), None, None, 1)
    assert same(before, snapshot(step)), "batch norm statistics included"
    step(images(2), None, None, 2)
    assert not same(before, snapshot(step))
    assert (int(step.bad_steps), int(step.first_bad)) == (1, 1)


def test_non_finite_images_do_not_spoil_batch_norm_when_skipped():
    step = train_step(TinyMethod(), stop=False)
    spoiled = images()
    spoiled[0, 0, 0, 0] = float("inf")
    step(spoiled, None, None, 0)
    assert all(bool(torch.isfinite(t).all()) for t in step.method.state_dict().values())
    assert int(step.bad_steps) == 1


def test_frozen_parameters_stay():
    method = TinyMethod()
    step = train_step(method, weight_decay=0.5)
    step(images(), None, None, 0)
    assert torch.equal(method.encoder.frozen, torch.ones(3, 3))


def test_ema_follows_weights_and_copies_buffers():
    method = TinyMethod()
    ema = Ema(method, 0.9)
    start = copy.deepcopy(method.state_dict())
    train_step(method, ema=ema)(images(), None, None, 0)
    for name, tensor in method.state_dict().items():
        trained = name in dict(method.named_parameters()) and name != "encoder.frozen"
        expected = 0.9 * start[name] + 0.1 * tensor if trained else tensor
        torch.testing.assert_close(ema.average[name], expected, msg=name)


def test_bf16_keeps_weights_in_fp32():
    method = TinyMethod()
    out = train_step(method, precision="bf16")(images(), None, None, 0)
    assert out.loss.dtype == torch.float32
    assert {p.dtype for p in method.parameters()} == {torch.float32}


def test_pictures_only_when_asked_for():
    step = train_step(TinyMethod(), accumulate=2)
    assert step(images(), None, None, 0).pictures is None
    pictures = step(images(), None, None, 1, pictures=True).pictures()
    assert pictures.original.shape == (BATCH // 2, 3, SIZE, SIZE)
