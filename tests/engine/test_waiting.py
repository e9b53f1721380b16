"""How long training waits for images, on the host's clock and on the device's, and the line about it."""

import json
import logging
import time

import pytest
import torch

from fastmim.data import DataConfig, create_loader, create_source, dali_trial
from fastmim.engine import waiting
from fastmim.engine.waiting import DataWait, WaitHint
from tests.engine.tiny_run import DrawnLoader, tiny_run


def test_on_a_cpu_it_is_the_time_of_the_loader():
    wait = DataWait(torch.device("cpu"))
    for _ in range(2):
        wait.ask()
        time.sleep(0.02)
        wait.begin()
        time.sleep(0.05)  # the step
        wait.end()
    assert 0.04 <= wait.read() < 0.08
    assert wait.read() == 0


class Event:
    """A CUDA event on a device that gets to each of them at a given second."""

    def __init__(self, at):
        self.at, self.waited_for = at, False

    def synchronize(self):
        self.waited_for = True

    def elapsed_time(self, other):
        assert other.waited_for
        return 1e3 * (other.at - self.at)


@pytest.mark.parametrize("idle, expected", [(0.0, 0.0), (0.01, 0.01), (5.0, 0.03)])
def test_on_a_gpu_it_counts_only_while_the_device_is_idle(monkeypatch, idle, expected):
    clock = [0.0]

    def now():
        return Event(clock[0])

    monkeypatch.setattr(waiting, "_now", now)
    wait = DataWait(torch.device("cuda", 0))
    wait.ask()
    wait.begin()
    wait.end()
    first = wait.read()
    assert first < 0.01  # nothing ran before: the host's clock
    clock[0] += idle
    wait.ask()
    time.sleep(0.03)
    wait.begin()
    wait.end()
    assert wait.read() == pytest.approx(expected, abs=0.01)


def hinted(shares, caplog):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        hint = WaitHint(lambda: "read faster")
        for share in shares:
            hint.update({"data_wait": share})
    return caplog.messages


def test_the_line_comes_once_when_it_goes_on(caplog):
    expected = ["Training waits for images 30 % of the time: read faster."]
    assert hinted([0.9, 0.3, 0.3, 0.3, 0.9, 0.9, 0.9], caplog) == expected
    assert hinted([0.9, 0.9, 0.1, 0.3, 0.3, 0.1, 0.2, 0.2, 0.2], caplog) == []
    assert hinted([0.0, 0.1, 0.3, 0.3, 0.3], caplog) == expected


def test_a_run_that_waits_says_so(tmp_path, caplog):
    class Slow(DrawnLoader):
        def __next__(self):
            time.sleep(0.05)
            return super().__next__()

    with caplog.at_level(logging.WARNING):
        tiny_run(tmp_path, total=6, log={"every": 1}, loader=Slow)
    lines = [message for message in caplog.messages if "waits for images" in message]
    assert len(lines) == 1
    assert lines[0].endswith("of the time: draw them faster.")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(line["data_wait"] > 0.5 for line in lines[1:])


def test_the_advice_fits_the_settings(jpeg_folder, monkeypatch):
    def advice(training="cpu", **settings):
        cfg = DataConfig(root=jpeg_folder, **settings)
        with create_loader(create_source(cfg), cfg, (32, 32), 4, 0, device=torch.device(training)) as loader:
            return loader.advice()

    monkeypatch.setattr("fastmim.data.loader.cpus", lambda: 8)
    monkeypatch.setattr(dali_trial, "why_not", lambda device="cpu": "not installed")
    assert "--data.workers 8" in advice(workers=2)
    assert "--data.workers" not in advice(workers=8)
    assert "dali" not in advice(workers=2)
    on_gpu = advice("cuda", workers=2)
    assert "pip install" in on_gpu
    assert "--data.pipeline dali" in on_gpu
    assert "--data.output uint8" in on_gpu
    assert "--data.output" not in advice("cuda", output="uint8")
    monkeypatch.setattr(dali_trial, "why_not", lambda device="cpu": "")
    assert "pip install" not in advice("cuda", pipeline="pillow")
    with_dali = advice("cuda", pipeline="dali", workers=8)
    assert "dali" not in with_dali
    assert "uint8" not in with_dali
    assert "smaller files" in with_dali
