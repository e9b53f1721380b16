"""The watchdog by itself; tests/faults/test_hangs.py has it on the real command."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastmim.engine.watchdog import Watchdog

SCRIPT = """
import ctypes, json, multiprocessing, pathlib, sys, threading, time
from fastmim.engine.watchdog import Watchdog

folder = pathlib.Path(sys.argv[1])
words = lambda code, reason: (folder / "words").write_text(json.dumps([code, reason]))

def a_thread_that_waits():
    threading.Event().wait()

threading.Thread(target=a_thread_that_waits, daemon=True).start()

def start_a_worker():
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
    worker.start()
    (folder / "worker").write_text(str(worker.pid))

def the_step_that_hangs():
    {hang}

with Watchdog(0.4, folder / "log", words, patience=0.1) as watchdog:
    for step in range(1, 4):
        watchdog.at(step, "training")
        time.sleep(0.2)
    the_step_that_hangs()
"""


def runs(pid):
    """Whether this process exists, and not only as a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def hung(folder, hang):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(hang=hang), str(folder)], capture_output=True, text=True, timeout=60
    )
    assert time.monotonic() - began < 30
    return done.returncode, (folder / "log").read_text()


def test_no_progress_ends_with_124_the_stacks_of_all_threads_and_no_worker_left(tmp_path):
    code, log = hung(tmp_path, "start_a_worker(); threading.Event().wait()")
    assert code == 124
    assert "the_step_that_hangs" in log
    assert "a_thread_that_waits" in log
    said, reason = json.loads((tmp_path / "words").read_text())
    assert said == 124
    assert "No progress for 0.4 s (training, step 3" in reason
    assert not runs(int((tmp_path / "worker").read_text()))


def test_c_code_that_holds_pythons_lock_is_noticed_too(tmp_path):
    code, log = hung(tmp_path, "ctypes.PyDLL(None).sleep(60)")
    assert code == 1
    assert "the_step_that_hangs" in log


def test_progress_and_the_end_of_training_keep_it_quiet(tmp_path):
    with Watchdog(0.3, tmp_path / "log", lambda *_: pytest.fail("bit")) as watchdog:
        for step in range(8):
            watchdog.at(step, "training")
            time.sleep(0.1)
    time.sleep(0.5)
    with Watchdog(0, tmp_path / "log", lambda *_: pytest.fail("bit")):
        time.sleep(0.1)
    assert (tmp_path / "log").read_text() == ""
