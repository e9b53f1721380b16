"""Commands whose output nobody reads to its end."""

import os
import subprocess
import sys

import pytest

from fastmim.closed_output import PIPE_CLOSED, while_output_is_read


def into_closed_pipe(*words):
    """The command's exit code and stderr, its stdout being a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([sys.executable, *words], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(writing)
    return done.returncode, done.stderr


@pytest.mark.parametrize("words", [["fastmim.train", "--print_config"], ["fastmim.info"]], ids=" ".join)
def test_a_closed_pipe_ends_a_command_quietly(words):
    pytest.importorskip("jsonargparse")
    assert into_closed_pipe("-m", *words) == (PIPE_CLOSED, "")


@pytest.mark.parametrize("name", ["export", "evaluate", "train", "info"])
def test_help_that_nobody_reads_is_no_error(name):
    pytest.importorskip("jsonargparse")
    code, errors = into_closed_pipe("-m", f"fastmim.{name}", "--help")
    assert code in (0, PIPE_CLOSED)  # argparse itself passes over a pipe that closes while it writes
    assert errors == ""


def test_what_is_printed_before_stays():
    script = "python -m fastmim.info --help | head -n 1"
    environment = os.environ | {"PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == "usage: python -m fastmim.info\n"
    assert done.stderr == ""


def test_another_broken_pipe_is_a_bug(capfd):
    with pytest.raises(BrokenPipeError), while_output_is_read():
        raise BrokenPipeError
    with pytest.raises(SystemExit) as left, while_output_is_read():
        raise SystemExit(2)
    assert left.value.code == 2
