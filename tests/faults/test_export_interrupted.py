"""Exports that do not come to their end: row 48 of the fault table, on the real command."""

import signal

import pytest
from safetensors.torch import load_file

from tests.faults.command import run

pytestmark = pytest.mark.slow


def test_a_killed_export_leaves_the_one_before_it_and_a_repeat_completes_it(finished):
    """Killed before model.safetensors takes its place, with nothing there yet; then with a full disk; then for good."""
    folder = finished / "export"
    killed = run("fastmim.export", finished, inject="sigkill@export=2")
    assert killed.returncode == -signal.SIGKILL
    assert not (folder / "model.safetensors").exists()
    done = run("fastmim.export", finished)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"], "nothing half-done"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    full = run("fastmim.export", finished, inject="enospc@export=2")
    assert full.returncode == 5
    assert "No space left on device" in full.stderr
    assert "Traceback" not in full.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert load_file(folder / "model.safetensors")
