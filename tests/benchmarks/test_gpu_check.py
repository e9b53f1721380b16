"""benchmarks/gpu_check.sh: its answer without a GPU, and its bookkeeping with every stage played by a stand-in."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.sh"

STAND_IN = """#!/usr/bin/env bash
case "$1 ${2:-}" in
    "-c import nvidia.dali") exit "${DALI_CODE:-0}" ;;
    "-c "*) printf 'a warning\\nGPU\\tnvidia-h200\\t90\\t2.11.0\\tNVIDIA H200\\n' ;;
    "- "*) exec REAL "$@" ;;
    "-m pytest") echo "3 passed in 1.00s"; exit "${PYTEST_CODE:-0}" ;;
    *) echo "did $*"; echo ;;
esac
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_without_a_gpu_it_says_so_and_exits_2(tmp_path):
    done = run(str(tmp_path / "results"), PYTHON=sys.executable, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert "nothing was run: torch" in done.stdout
    assert "finds no usable GPU" in done.stdout
    assert not (tmp_path / "results").exists()


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    path = tmp_path / "python"
    path.write_text(STAND_IN.replace("REAL", sys.executable))
    path.chmod(0o755)
    return str(path)


def test_all_stages_pass(stand_in, tmp_path):
    done = run(str(tmp_path / "results"), PYTHON=stand_in)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "results" / "check.json").read_text())
    assert summary["passed"]
    assert (summary["gpu"], summary["torch"]) == ("NVIDIA H200", "2.11.0")
    stages = {stage["stage"]: stage for stage in summary["stages"]}
    assert list(stages)[:3] == ["build", "info", "gpu_tests"]
    assert list(stages)[-5:] == ["ops", "throughput", "pieces", "compiled", "data"]
    files = len(list((SCRIPT.parents[1] / "tests").rglob("test_*.py")))
    assert stages["suite"]["last_line"].strip() == f"{3 * files} passed"
    assert stages["build"]["last_line"] == "did setup.py build_ext --inplace"
    assert "===== throughput: passed" in (tmp_path / "results" / "gpu_check.log").read_text()


def test_a_failing_stage_fails_the_check_and_the_others_still_run(stand_in, tmp_path):
    done = run(str(tmp_path / "results"), PYTHON=stand_in, PYTEST_CODE="1")
    assert done.returncode == 1
    assert "failed (1)" in done.stdout
    summary = json.loads((tmp_path / "results" / "check.json").read_text())
    assert not summary["passed"]
    assert summary["stages"][-1] == summary["stages"][-1] | {"stage": "data", "status": "passed"}


def test_reading_images_is_left_out_where_dali_is_not_installed(stand_in, tmp_path):
    done = run(str(tmp_path / "results"), PYTHON=stand_in, DALI_CODE="1")
    assert done.returncode == 0
    assert "skipped: DALI is not installed" in done.stdout
    summary = json.loads((tmp_path / "results" / "check.json").read_text())
    assert "data" not in [stage["stage"] for stage in summary["stages"]]


def test_files_whose_tests_all_need_the_gpu_are_no_failure(stand_in, tmp_path):
    done = run(str(tmp_path / "results"), PYTHON=stand_in, PYTEST_CODE="5")
    stages = {s["stage"]: s["status"] for s in json.loads((tmp_path / "results" / "check.json").read_text())["stages"]}
    assert stages["suite"] == "passed"
    assert stages["gpu_tests"] == "failed (5)"  # but a GPU stage without tests is one
    assert done.returncode == 1
