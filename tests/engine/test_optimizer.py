import copy

import pytest
import torch
from torch import nn

from fastmim.engine.errors import CheckpointError
from fastmim.engine.optimizer import (
    create_optimizer,
    load_optimizer_state,
    optimizer_state,
    parameter_groups,
    set_lr,
)
from fastmim.engine.settings import OptimConfig
from tests.engine.tiny_run import TinyMethod


def backward(method):
    torch.manual_seed(1)
    for parameter in method.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)


def test_groups_hold_every_trained_parameter_once_with_its_decay_and_scale():
    method = TinyMethod()
    groups = parameter_groups(method, 0.05, method.no_weight_decay(), method.lr_scales())
    found = {n: (g["weight_decay"], g["lr_scale"]) for g in groups for n in g["names"]}
    assert found == {
        "encoder.token": (0.0, 0.1),
        "encoder.embed.weight": (0.05, 1.0),
        "encoder.embed.bias": (0.0, 1.0),
        "encoder.norm.weight": (0.0, 1.0),
        "encoder.norm.bias": (0.0, 1.0),
        "head.weight": (0.05, 1.0),
        "head.bias": (0.0, 1.0),
    }
    assert sum(len(g["params"]) for g in groups) == len(found)


def test_a_scale_for_a_parameter_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"head\.wait"):
        parameter_groups(TinyMethod(), 0.0, (), {"head.wait": 2.0})


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(nn.ReLU(), 0.0)


def test_learning_rate_is_scaled_per_parameter():
    method = TinyMethod()
    optimizer = create_optimizer(method, OptimConfig())
    set_lr(optimizer, 0.5)
    rates = {n: g["lr"] for g in optimizer.param_groups for n in g["names"]}
    assert rates["encoder.token"] == pytest.approx(0.05)
    assert rates["head.weight"] == 0.5


def test_steps_equal_plain_adamw():
    method = TinyMethod()
    twin = copy.deepcopy(method)
    optimizer = create_optimizer(method, OptimConfig(weight_decay=0.1))
    set_lr(optimizer, 0.01)
    groups = parameter_groups(twin, 0.1, twin.no_weight_decay(), twin.lr_scales())
    plain = torch.optim.AdamW(
        [{"params": g["params"], "weight_decay": g["weight_decay"], "lr": 0.01 * g["lr_scale"]} for g in groups],
        betas=(0.9, 0.95),
        foreach=False,
        fused=False,
    )
    for _ in range(3):
        backward(method)
        backward(twin)
        optimizer.step()
        plain.step()
    for (name, ours), theirs in zip(method.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_found_inf_leaves_weights_and_state_untouched():
    method = TinyMethod()
    optimizer = create_optimizer(method, OptimConfig())
    set_lr(optimizer, 0.01)
    backward(method)
    optimizer.step()
    before = copy.deepcopy(method.state_dict()), copy.deepcopy(optimizer_state(optimizer))
    method.head.weight.grad.fill_(float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for old, new in zip(before, (method.state_dict(), optimizer_state(optimizer)), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in new)


def test_state_goes_round():
    method = TinyMethod()
    optimizer = create_optimizer(method, OptimConfig())
    set_lr(optimizer, 0.01)
    backward(method)
    method.head.bias.grad = None  # a parameter without a gradient has no state
    optimizer.step()
    saved = {k: v.clone() for k, v in optimizer_state(optimizer).items()}
    assert "exp_avg/head.bias" not in saved

    twin = copy.deepcopy(method)
    other = create_optimizer(twin, OptimConfig())
    load_optimizer_state(other, saved, "here")
    set_lr(other, 0.01)
    for one, two in ((method, optimizer), (twin, other)):
        backward(one)
        two.step()
    assert all(torch.equal(a, b) for a, b in zip(method.parameters(), twin.parameters(), strict=True))


def test_state_that_does_not_fit_changes_nothing():
    method = TinyMethod()
    optimizer = create_optimizer(method, OptimConfig())
    backward(method)
    optimizer.step()
    saved = dict(optimizer_state(optimizer))
    before = {k: v.clone() for k, v in saved.items()}
    saved["exp_avg/head.weight"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match=r"exp_avg/head\.weight is \[2, 2\]"):
        load_optimizer_state(optimizer, saved, "here")
    assert all(torch.equal(before[k], v) for k, v in optimizer_state(optimizer).items())
