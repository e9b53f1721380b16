import copy
import sys
import types

import pytest
import torch
from torch import nn

from fastmim.engine.lamb import Lamb, apex_lamb, create_lamb, find_apex
from fastmim.engine.optimizer import (
    create_optimizer,
    load_optimizer_state,
    optimizer_state,
    parameter_groups,
    set_lr,
    set_weight_decay,
)
from fastmim.engine.schedule import Schedule
from fastmim.engine.settings import OptimConfig
from fastmim.engine.step import TrainStep
from tests.engine.tiny_run import SIZE, TinyMethod

BETAS, EPS = (0.9, 0.95), 1e-6


def plain_lamb(parameters, gradients, averages, squares, count, *, lr, decay, betas=BETAS, eps=EPS):
    """One step, tensor by tensor, as the paper and NVIDIA's kernel have it. In place."""
    for p, g, m, v in zip(parameters, gradients, averages, squares, strict=True):
        m.copy_(betas[0] * m + (1 - betas[0]) * g)
        v.copy_(betas[1] * v + (1 - betas[1]) * g * g)
        update = (m / (1 - betas[0] ** count)) / ((v / (1 - betas[1] ** count)).sqrt() + eps) + decay * p
        trust = 1.0
        if decay != 0 and p.norm() > 0 and update.norm() > 0:
            trust = float(p.norm() / update.norm())
        p.sub_(lr * trust * update)


class PlainFusedLAMB(torch.optim.Optimizer):
    """What apex's FusedLAMB does, without its kernels: host numbers, a step count for each group, no finite check."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, max_grad_norm=1.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.max_grad_norm = max_grad_norm

    def zero_grad(self):
        raise AssertionError("apex's own zero_grad takes no set_to_none")

    def step(self, closure=None):
        norms = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        clip = max(float(torch.stack(norms).norm()) / self.max_grad_norm, 1.0)
        for group in self.param_groups:
            assert isinstance(group["lr"], float)
            group["step"] = group.get("step", 0) + 1
            trained = [p for p in group["params"] if p.grad is not None]
            for p in trained:
                if len(self.state[p]) == 0:
                    self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            plain_lamb(
                [p.data for p in trained],
                [p.grad / clip for p in trained],
                [self.state[p]["exp_avg"] for p in trained],
                [self.state[p]["exp_avg_sq"] for p in trained],
                group["step"],
                lr=group["lr"],
                decay=group["weight_decay"],
                betas=group["betas"],
                eps=group["eps"],
            )


def tensors(dtype=torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    values = [torch.randn(7, 5), torch.zeros(4, 3), torch.randn(6), 1e3 * torch.randn(3, 2, 3, 3)]
    return [nn.Parameter(value.to(dtype)) for value in values]


def lamb_of(kind: str, parameters, decay: float, lr: float = 0.02) -> torch.optim.Optimizer:
    groups = [
        {"params": parameters[:2], "weight_decay": decay, "lr": lr},
        {"params": parameters[2:], "weight_decay": 0.0, "lr": lr / 2},
    ]
    if kind == "foreach":
        return Lamb(groups, betas=BETAS, eps=EPS)
    return apex_lamb(PlainFusedLAMB)(groups, lr=0.0, betas=BETAS, eps=EPS)


both_kinds = pytest.mark.parametrize("kind", ["foreach", "apex"])


@both_kinds
@pytest.mark.parametrize("decay", [0.0, 0.04])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_steps_equal_the_plain_reference(kind, decay, dtype, tolerance):
    ours, plain = tensors(dtype), [p.data.double() for p in tensors(dtype)]
    averages, squares = ([torch.zeros_like(p) for p in plain] for _ in range(2))
    optimizer = lamb_of(kind, ours, decay)
    for count in range(1, 8):
        gradients = [torch.randn_like(p) for p in plain]
        gradients[2].zero_()  # an update of nothing
        for parameter, gradient in zip(ours, gradients, strict=True):
            parameter.grad = gradient.to(dtype)
        optimizer.step()
        for part, lr, wd in ((slice(2), 0.02, decay), (slice(2, 4), 0.01, 0.0)):
            rounded = [gradient.to(dtype).double() for gradient in gradients[part]]
            plain_lamb(plain[part], rounded, averages[part], squares[part], count, lr=lr, decay=wd)
    for parameter, expected in zip(ours, plain, strict=True):
        error = (parameter.data.double() - expected).norm() / expected.norm().clamp(min=1)
        assert error <= tolerance


def test_a_rate_in_a_tensor_is_the_same_as_a_number():
    results = []
    for lr in (0.02, torch.tensor(0.02)):
        parameters = tensors()
        optimizer = Lamb([{"params": parameters, "lr": lr}])
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        results.append(parameters)
    for number, tensor in zip(*results, strict=True):
        torch.testing.assert_close(number, tensor)


@both_kinds
@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_leaves_everything_and_training_goes_on(kind, spoiled):
    parameters = tensors()
    optimizer = lamb_of(kind, parameters, 0.1)
    twins = tensors()
    twin = lamb_of(kind, twins, 0.1)

    def step(which, own, value=None, seed=0):
        torch.manual_seed(seed)
        for parameter in own:
            parameter.grad = torch.randn_like(parameter)
        which.found_inf = torch.zeros(())
        if value is not None:
            own[0].grad[0, 0] = value
            which.found_inf = torch.ones(())
        which.step()

    step(optimizer, parameters, seed=1)
    before = [p.detach().clone() for p in parameters]
    states = copy.deepcopy([optimizer.state[p] for p in parameters])
    step(optimizer, parameters, spoiled, seed=2)
    for old, new, state in zip(before, parameters, states, strict=True):
        assert torch.equal(old, new)
        assert all(torch.equal(state[key], optimizer.state[new][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    step(twin, twins, seed=1)
    if kind == "foreach":  # as if the bad step had never been; FusedLAMB counts it in its corrections
        step(optimizer, parameters, seed=3)
        step(twin, twins, seed=3)
        assert all(torch.equal(a, b) for a, b in zip(parameters, twins, strict=True))


def test_a_bad_first_step_leaves_everything_too():
    parameters = tensors()
    optimizer = lamb_of("foreach", parameters, 0.1)
    before = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_the_train_step_trains_with_it_clips_and_survives_a_bad_batch():
    torch.manual_seed(0)
    method = TinyMethod()
    optim = OptimConfig(name="lamb", lr=0.01, eps=1e-6, clip_grad_norm=5.0)
    optimizer = create_optimizer(method, optim)
    assert isinstance(optimizer, Lamb)
    set_lr(optimizer, 0.01)
    step = TrainStep(
        method,
        optimizer,
        optim,
        precision="fp32",
        device=torch.device("cpu"),
        seed=0,
        micro_batch=8,
        stop=False,
        ema=None,
    )
    images, losses = torch.randn(3, 1, 1).expand(8, 3, SIZE, SIZE) + 0.1 * torch.randn(8, 3, SIZE, SIZE), []
    for index in range(40):
        losses.append(float(step(images, None, None, index).loss))
        if index == 20:
            before = copy.deepcopy(method.state_dict())
            step(torch.full_like(images, float("nan")), None, None, index)
            assert all(torch.equal(before[key], value) for key, value in method.state_dict().items())
    assert losses[-1] < 0.95 * losses[0]


def test_rates_are_scaled_by_parameter():
    method = TinyMethod()
    optimizer = create_optimizer(method, OptimConfig(name="lamb"))
    set_lr(optimizer, 0.5)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates["encoder.token"] == pytest.approx(0.05)
    assert rates["head.weight"] == 0.5


@both_kinds
def test_checkpoints_go_round_and_between_the_two_implementations(kind):
    other_kind = {"foreach": "apex", "apex": "foreach"}[kind]

    def build(kind, method):
        if kind == "foreach":
            return create_optimizer(method, OptimConfig(name="lamb"))
        groups = [dict(group, lr=0.0) for group in parameter_groups(method, 0.05, method.no_weight_decay())]
        return apex_lamb(PlainFusedLAMB)(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)

    def do_step(method, optimizer, seed):
        torch.manual_seed(seed)
        for parameter in method.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        set_lr(optimizer, 0.01)
        optimizer.step()

    torch.manual_seed(0)
    method = TinyMethod()
    optimizer = build(kind, method)
    for seed in range(3):
        do_step(method, optimizer, seed)
    saved = {key: value.clone() for key, value in optimizer_state(optimizer).items()}
    assert saved["step/head.weight"] == 3
    twin = copy.deepcopy(method)
    other = build(other_kind, twin)
    load_optimizer_state(other, saved, "here")
    for group in optimizer.param_groups + other.param_groups:
        group["lr_scale"] = 1.0
    do_step(method, optimizer, 7)
    do_step(twin, other, 7)
    for (name, ours), theirs in zip(method.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, msg=name)


def test_weight_decay_goes_along_half_a_cosine_in_decayed_groups_only():
    optim = OptimConfig(name="lamb", weight_decay=0.04, weight_decay_end=0.2, warmup_epochs=2)
    schedule = Schedule.of(optim, peak=1.0, total_steps=101, steps_per_epoch=10)
    values = [schedule.weight_decay(step) for step in range(101)]
    assert (values[0], values[50], values[100]) == pytest.approx((0.04, 0.12, 0.2))
    assert values == sorted(values)
    optimizer = create_optimizer(TinyMethod(), optim)
    set_weight_decay(optimizer, values[50])
    decays = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["names"]}
    assert decays["head.weight"] == pytest.approx(0.12)
    assert decays["head.bias"] == decays["encoder.token"] == 0.0


def test_weight_decay_without_an_end_stays_and_adamw_has_it_too():
    assert {Schedule.of(OptimConfig(), peak=1, total_steps=9, steps_per_epoch=3).weight_decay(i) for i in range(9)} == {
        0.05
    }
    optimizer = create_optimizer(TinyMethod(), OptimConfig(weight_decay_end=0.2))
    set_weight_decay(optimizer, 0.1)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}


def test_warm_up_may_begin_above_zero():
    optim = OptimConfig(warmup_steps=10, warmup_start=0.005)
    schedule = Schedule.of(optim, peak=2.0, total_steps=100, steps_per_epoch=10)
    assert [schedule.lr(step) for step in (0, 5, 10)] == pytest.approx([0.01, 2 * (0.005 + 0.995 / 2), 2.0])


@pytest.mark.parametrize(
    "settings, sentence",
    [({"weight_decay_end": -0.1}, "weight_decay_end must not be negative"), ({"warmup_start": 1.5}, "is a share")],
)
def test_impossible_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        OptimConfig(**settings)


def test_apex_is_found_by_its_compiled_part_and_used_on_gpus_only(monkeypatch):
    find_apex.cache_clear()
    monkeypatch.setitem(sys.modules, "amp_C", None)  # not importable
    assert find_apex() is None
    find_apex.cache_clear()
    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedLAMB = PlainFusedLAMB  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "amp_C", types.ModuleType("amp_C"))
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    assert find_apex() is PlainFusedLAMB
    assert isinstance(create_lamb([{"params": tensors()}], betas=BETAS, eps=EPS), Lamb)
    find_apex.cache_clear()


def test_a_step_on_the_device_needs_no_host():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # from a fake tensor no value can be had
        parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3))]
        optimizer = lamb_of("foreach", parameters, 0.1)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.1)
        optimizer.found_inf = torch.zeros(())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
