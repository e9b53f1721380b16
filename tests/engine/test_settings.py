import subprocess
import sys

import pytest

from fastmim.engine.settings import EngineConfig, LogConfig, OptimConfig, in_steps


@pytest.mark.parametrize(
    "period, steps",
    [(200, 200), ("200", 200), ("200 steps", 200), ("1ep", 30), ("0.5ep", 15), ("2 epochs", 60), (0, 0)],
)
def test_period_in_steps(period, steps):
    assert in_steps(period, 30) == steps


def test_a_period_of_epochs_is_at_least_one_step():
    assert in_steps("0.001ep", 30) == 1


@pytest.mark.parametrize("period", ["often", "-3", "1.5", "1ep2", ""])
def test_impossible_period_is_named(period):
    with pytest.raises(ValueError, match="epochs"):
        in_steps(period, 30)


@pytest.mark.parametrize(
    "config, values, key",
    [
        (OptimConfig, {"lr": 1e-3, "base_lr": 1e-3}, "optim.base_lr"),
        (OptimConfig, {"lr": -1.0}, "optim.lr"),
        (OptimConfig, {"lr": float("nan")}, "optim.lr"),
        (OptimConfig, {"betas": (0.9, 1.0)}, "optim.betas"),
        (OptimConfig, {"warmup_epochs": 1, "warmup_steps": 1}, "optim.warmup_epochs"),
        (OptimConfig, {"clip_grad_norm": 0.0}, "optim.clip_grad_norm"),
        (OptimConfig, {"accumulate": 0}, "optim.accumulate"),
        (EngineConfig, {"checkpoint_every": "daily"}, "engine.checkpoint_every"),
        (EngineConfig, {"keep_checkpoints": 0}, "engine.keep_checkpoints"),
        (EngineConfig, {"ema": 1.0}, "engine.ema"),
        (LogConfig, {"every": 0}, "log.every"),
        (LogConfig, {"pictures_every": "x"}, "log.pictures_every"),
    ],
)
def test_impossible_values_name_their_key(config, values, key):
    with pytest.raises(ValueError, match=key):
        config(**values)


def test_peak_learning_rate():
    assert OptimConfig(lr=3e-4).peak_lr(4096) == 3e-4
    assert OptimConfig(base_lr=1.5e-4).peak_lr(4096) == pytest.approx(2.4e-3)
    assert OptimConfig(base_lr=1e-4, lr_per=512).peak_lr(2048) == pytest.approx(4e-4)
    assert OptimConfig().peak_lr(4096) == pytest.approx(2.4e-3)
    assert OptimConfig().peak_lr(64) == 5e-4


def test_settings_do_not_load_torch():
    code = "import sys, fastmim.engine.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
