import json
import logging
import sys

import pytest

from fastmim.engine.metrics import MetricsFile, cut_metrics
from fastmim.engine.tensorboard import create_board


def test_lines_are_there_as_soon_as_written(tmp_path):
    metrics = MetricsFile(tmp_path / "m.jsonl")
    metrics.write({"step": 1, "loss": 0.1})
    metrics.write({"step": 2, "loss": float("nan")})
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": None}]
    metrics.close()
    metrics.close()


def test_cutting_drops_later_and_torn_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(f'{{"step": {i}}}\n' for i in range(1, 6)) + '{"step": 6, "lo')
    cut_metrics(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    path.write_text('{"step": 1}\n{"st')
    cut_metrics(path, 3)
    assert path.read_text() == '{"step": 1}\n'
    cut_metrics(tmp_path / "none", 3)


def test_a_full_disk_is_one_warning(caplog):
    from pathlib import Path

    metrics = MetricsFile(Path("/dev/full"))
    for step in range(3):
        metrics.write({"step": step})
    assert caplog.text.count("metrics.jsonl cannot be written") == 1


def test_missing_tensorboard_is_one_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    board = create_board(True, tmp_path, 0)
    board.scalars({"loss": 1.0}, 1)
    board.close()
    assert caplog.text.count("No TensorBoard events") == 1
    assert "pip install tensorboard" in caplog.text


def test_a_failing_writer_is_one_warning(tmp_path, caplog):
    board = create_board(True, tmp_path, 0)

    def refuse(*_):
        raise OSError("No space left on device")

    board._writer.add_scalar = refuse
    board.scalars({"loss": 1.0}, 1)
    board.scalars({"loss": 1.0}, 2)
    board.close()
    assert caplog.text.count("TensorBoard events stop here") == 1


def test_tensorboard_holds_scalars_and_hides_what_a_resume_repeats(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        board = create_board(True, tmp_path, start)
        for step in steps:
            board.scalars({"step": step, "loss": float(step + start), "lr": None}, step)
        board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 5.0), (4, 6.0)]


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.INFO)
