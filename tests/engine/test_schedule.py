import logging
import math

import pytest

from fastmim.engine.schedule import Schedule
from fastmim.engine.settings import OptimConfig


def schedule(total=100, per_epoch=10, peak=1.0, **optim):
    return Schedule.of(OptimConfig(**optim), peak=peak, total_steps=total, steps_per_epoch=per_epoch)


def test_warm_up_is_linear_from_zero_then_the_cosine_starts_at_its_peak():
    s = schedule(warmup_epochs=2, min_lr=0.1)
    assert [s.lr(i) for i in (0, 5, 10, 19)] == pytest.approx([0.0, 0.25, 0.5, 0.95])
    assert s.lr(20) == pytest.approx(1.0)
    assert s.lr(60) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert 0.1 < s.lr(99) < 0.11


def test_multistep_drops_at_its_epochs():
    s = schedule(schedule="multistep", milestones=[7, 3], gamma=0.1, warmup_steps=4)
    assert [s.lr(i) for i in (0, 2, 4, 29, 30, 69, 70)] == pytest.approx([0, 0.5, 1, 1, 0.1, 0.1, 0.01])


def test_constant_stays():
    s = schedule(schedule="constant")
    assert {s.lr(i) for i in range(100)} == {1.0}


@pytest.mark.parametrize("total", [1, 5, 40])
def test_warm_up_longer_than_the_run_is_shortened_and_said(total, caplog):
    with caplog.at_level(logging.WARNING):
        s = schedule(total=total, warmup_epochs=40)
    assert s.warmup_steps == total // 10
    assert "400" in caplog.text
    assert str(total) in caplog.text
    assert max(s.lr(i) for i in range(total)) == pytest.approx(1.0)


def test_min_lr_above_the_peak_is_the_peak(caplog):
    s = schedule(peak=1e-6, min_lr=1e-5)
    assert {s.lr(i) for i in range(100)} == {1e-6}
    assert "min_lr" in caplog.text


def test_no_warm_up_starts_at_the_peak(caplog):
    assert schedule().lr(0) == 1.0
    assert not caplog.text
