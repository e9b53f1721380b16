import io
import sys

import pytest

from fastmim.engine import progress as progress_module
from fastmim.engine.logs import say
from fastmim.engine.progress import create_progress, describe, duration

VALUES = {"loss": 0.43214, "images_per_second": 1234.5, "data_wait": 0.031}


def test_words():
    assert describe(VALUES) == "loss 0.4321  1,234 images/s  data wait 3 %"
    assert describe({**VALUES, "images_per_second": 8.26, "loss": float("nan")}).startswith("loss nan  8.3 images/s")
    assert [duration(s) for s in (3.2, 75, 3700)] == ["0:03", "1:15", "1:01:40"]


def test_plain_lines_are_not_too_many_and_include_the_last(capsys):
    progress = create_progress("auto", 0, 100)  # stdout is no terminal here
    for step in range(10, 101, 10):
        progress.update(step, VALUES)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step 10/100  loss 0.4321  1,234 images/s  data wait 3 %  ")
    assert lines[1].startswith("step 100/100")


def test_none_says_nothing(capsys):
    progress = create_progress("none", 0, 10)
    progress.update(10, VALUES)
    progress.close()
    assert capsys.readouterr().out == ""


def test_bar_shows_the_numbers(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    progress = create_progress("bar", 0, 10)
    progress.update(5, VALUES)
    progress.update(10, VALUES)
    progress.close()
    out = capsys.readouterr().out
    assert "10/10" in out
    assert "1,234 images/s" in out
    assert "data wait 3 %" in out


def test_without_rich_lines_are_plain(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    progress = create_progress("bar", 0, 10)
    assert isinstance(progress, progress_module._Lines)
    progress.update(10, VALUES)
    assert "step 10/10" in capsys.readouterr().out


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), ValueError("I/O operation on closed file")])
def test_a_closed_stdout_is_quietly_passed_over(monkeypatch, error):
    class Closed(io.StringIO):
        def write(self, text):
            raise error

    monkeypatch.setattr(sys, "stdout", Closed())
    say("hello")
    create_progress("plain", 0, 10).update(10, VALUES)


def test_no_stdout_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    say("hello")
    create_progress("auto", 0, 10).update(10, VALUES)


def test_a_terminal_that_knows_only_ascii(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    say("A²MIM")
    assert stream.buffer.getvalue() == b"A\\xb2MIM\n"
