import os
import random
import signal

import numpy as np
import pytest
import torch

from fastmim.engine.injector import _parse
from fastmim.engine.precision import autocast, choose_device, choose_precision
from fastmim.engine.rng import rng_states, seed_step, set_rng_states
from fastmim.engine.signals import CODES, StopSignals

CPU = torch.device("cpu")


@pytest.mark.parametrize("number, code", [("SIGINT", 130), ("SIGTERM", 75), ("SIGUSR1", 75)])
def test_a_signal_only_sets_the_flag(number, code):
    before = signal.getsignal(getattr(signal, number))
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), getattr(signal, number))
        assert signals.received.name == number
        assert CODES[signals.received] == code
    assert signal.getsignal(getattr(signal, number)) == before


def test_a_second_signal_exits_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # an echo of the first
        assert left == []
        signals._since -= 10
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert left == [75, 130]


def test_random_states_go_round_as_json():
    import json

    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    random.gauss(0, 1), np.random.randn()  # leaves a cached second value in both
    states = json.loads(json.dumps(rng_states(CPU)))

    def draw():
        return random.gauss(0, 1), random.random(), np.random.randn(3).tolist(), torch.rand(3).tolist()

    first = draw()
    draw()
    set_rng_states(states, CPU)
    assert draw() == first


def test_a_step_draws_the_same_whatever_came_before():
    drawn = []
    for noise in (0, 5):
        torch.rand(noise)
        seed_step(1, 7, CPU)
        drawn.append(torch.rand(4))
    assert torch.equal(*drawn)
    for other in ((2, 7, CPU, 0), (1, 8, CPU, 0), (1, 7, CPU, 1)):
        seed_step(*other)
        assert not torch.equal(torch.rand(4), drawn[0])


def test_precision_says_why():
    assert choose_precision("fp32", CPU) == ("fp32", "as asked for")
    precision, why = choose_precision("auto", CPU)
    assert precision in ("bf16", "fp32")
    assert "bf16" in why
    with autocast("bf16", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast("fp32", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_precision_follows_the_cpu(monkeypatch):
    from fastmim.engine import precision

    for flags, expected in (("sse avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx512f avx2", "fp32"), ("", "fp32")):
        monkeypatch.setattr(precision, "_cpu_flags", lambda flags=flags: frozenset(flags.split()))
        assert choose_precision("auto", CPU)[0] == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_said():
    assert choose_device("auto") == CPU
    with pytest.raises(ValueError, match=r"engine\.device: cuda was asked for, but"):
        choose_device("cuda")


def test_faults_are_read_from_their_text():
    assert [(f.kind, f.where, f.first, f.last) for f in _parse("nan@loss=7, sigkill@rename=2-3,enospc@rename=2-")] == [
        ("nan", "loss", 7, 7),
        ("sigkill", "rename", 2, 3),
        ("enospc", "rename", 2, 1 << 62),
    ]
    with pytest.raises(ValueError, match="FASTMIM_INJECT"):
        _parse("explode@step=3")
