import json
import logging
import os
import signal
import subprocess
import sys

import pytest

from fastmim.data import BadDataError
from fastmim.engine import Interrupted, RunFolder, RunFolderError


def ending(folder):
    return json.loads((folder / "exit.json").read_text())


def test_layout_and_end(tmp_path):
    with RunFolder(tmp_path / "a" / "b") as run:
        run.write("config.yaml", "seed: 1\n")
        logging.getLogger("fastmim.something").info("a sentence about A²MIM")
        assert not (run.path / "exit.json").exists()
    assert ending(run.path)["code"] == 0
    assert "a sentence about A²MIM" in (run.path / "train.log").read_text(encoding="utf-8")
    assert run.checkpoints.is_dir()
    assert run.pictures.is_dir()


@pytest.mark.parametrize(
    "error, code",
    [
        (RuntimeError("odd"), 1),
        (BadDataError("too many"), 3),
        (Interrupted("stopped", 75), 75),
        (KeyboardInterrupt(), 130),
        (SystemExit(2), 2),
    ],
)
def test_exit_code_and_reason_are_written(tmp_path, error, code):
    with pytest.raises(type(error)), RunFolder(tmp_path):
        raise error
    assert ending(tmp_path)["code"] == code
    assert ending(tmp_path)["reason"]


def test_a_bug_leaves_its_traceback_in_the_log_only(tmp_path, capsys):
    with pytest.raises(ZeroDivisionError), RunFolder(tmp_path):
        1 / 0  # noqa: B018
    assert "ZeroDivisionError" in (tmp_path / "train.log").read_text()
    assert "Traceback" not in "".join(capsys.readouterr())


def test_messages_go_to_stdout_and_warnings_to_stderr(tmp_path, capsys):
    with RunFolder(tmp_path):
        logging.getLogger("fastmim").info("news")
        logging.getLogger("fastmim").warning("care")
    assert capsys.readouterr() == ("news\n", "warning: care\n")


def test_a_second_run_of_this_process_is_refused(tmp_path):
    with RunFolder(tmp_path):
        with pytest.raises(RunFolderError, match="this very process") as caught, RunFolder(tmp_path):
            pass
        assert caught.value.code == 2
    with RunFolder(tmp_path):
        pass


def test_a_second_process_is_refused_with_the_holder_named_and_a_dead_one_taken_over(tmp_path):
    code = f"""
import sys, time
from fastmim.engine import RunFolder
with RunFolder({str(tmp_path)!r}):
    print("held", flush=True)
    sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunFolderError, match=f"process {holder.pid} on"), RunFolder(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with RunFolder(tmp_path):
        pass
    assert f"process {holder.pid}" in (tmp_path / "train.log").read_text()
    assert ending(tmp_path)["code"] == 0


@pytest.mark.parametrize("place", ["file", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"), RunFolder(tmp_path / place):
        pass


def test_fresh_moves_an_earlier_run_aside_and_nothing_else(tmp_path):
    (tmp_path / "holiday.jpg").write_text("mine")
    for number in (1, 2):
        with RunFolder(tmp_path, fresh=True) as run:
            run.write("config.yaml", str(number))
            assert list(run.checkpoints.iterdir()) == []
            (run.checkpoints / "step-00000001").mkdir()
    assert (tmp_path / "previous-1" / "config.yaml").read_text() == "1"
    assert (tmp_path / "previous-1" / "checkpoints" / "step-00000001").is_dir()
    assert (tmp_path / "holiday.jpg").read_text() == "mine"
    assert not (tmp_path / "previous-2").exists()


def test_sigterm_outside_of_training_ends_with_75(tmp_path):
    with pytest.raises(Interrupted), RunFolder(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
    assert ending(tmp_path)["code"] == 75
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_log_that_cannot_be_written_is_one_warning(tmp_path, capsys):
    (tmp_path / "train.log").symlink_to("/dev/full")
    with RunFolder(tmp_path):
        for _ in range(3):
            logging.getLogger("fastmim").info("news")
    out, err = capsys.readouterr()
    assert out.count("news") == 3
    assert err.count("train.log cannot be written") == 1
