"""Images that are damaged, hostile, odd, or that vanish: rows 26 and 28 to 32 of the fault table, for real."""

import os
import re
import shutil
import signal
import sys
import time

import pytest

from tests.damaged_images import damaged  # noqa: F401  (a fixture)
from tests.faults.command import ending, metrics, start, train
from tests.faults.damaged_folder import fill
from tests.faults.test_hangs import children

pytestmark = pytest.mark.slow

PEAK = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def odd_folder(tmp_path, photographs, damaged):  # noqa: F811
    folder = tmp_path / "images"
    return folder, fill(folder, photographs["coffee"], damaged)


def unreadable(errors):
    """How often each file is named in the warnings, by name."""
    names = re.findall(r"unreadable image: .*/([^/]+?) \(", errors)
    return {name: names.count(name) for name in names}


def test_odd_images_are_read_damaged_ones_replaced_named_once_and_bombs_cost_no_memory(tmp_path, odd_folder, damaged):  # noqa: F811
    folder, readable = odd_folder
    out = tmp_path / "run"
    done = train(
        out, data__root=folder, data__workers=2, img_size=32, log__progress="plain", under=[sys.executable, "-c", PEAK]
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(readable) + len(damaged)} images" in done.stdout, "each once, in spite of the loop"
    assert unreadable(done.stderr) == dict.fromkeys(damaged, 1)
    assert "12000 x 12000 pixels, more than data.max_pixels" in done.stderr
    lines = metrics(out)
    assert lines[-1]["replaced_images"] >= len(damaged) * (12 * 16 // (len(readable) + len(damaged)))
    assert all(line["loss"] is not None for line in lines)
    peak = int(re.search(r"peak (\d+)", done.stderr)[1]) // 1024
    assert peak < 700, f"{peak} MB; decoding a bomb would take 400 more"


def test_more_damage_than_the_budget_allows_ends_with_3(tmp_path, odd_folder):
    folder, _ = odd_folder
    out = tmp_path / "run"
    stopped = train(out, data__root=folder, data__bad_budget=3, img_size=32)
    assert stopped.returncode == 3, stopped.stderr
    assert "4 of 16 images could not be read, more than the 3 allowed" in stopped.stderr
    assert "--data.bad_budget" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert ending(out)["code"] == 3


def test_a_file_that_vanishes_a_worker_that_is_killed_and_a_second_one(tmp_path, jpeg_folder):
    """One run: rows 31 and 32. Vanished and exchanged files are replaced; a worker is started again once, not twice."""
    folder, out = shutil.copytree(jpeg_folder, tmp_path / "images"), tmp_path / "run"
    process = start(out, data__root=folder, data__workers=2, img_size=32, max_steps=100_000)

    def wait_for(what, condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, what
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)

    log = out / "train.log"
    wait_for("the first line", lambda: (out / "metrics.jsonl").exists() and metrics(out))
    gone, changed = sorted(folder.iterdir())[:2]
    gone.unlink()
    changed.with_suffix(".new").write_bytes(b"<html>moved</html>")
    os.replace(changed.with_suffix(".new"), changed)
    wait_for("both named", lambda: log.read_text().count("unreadable image") == 2)
    wait_for("counted", lambda: metrics(out)[-1]["replaced_images"] >= 2)

    os.kill(children(process.pid)[0], signal.SIGKILL)
    wait_for("started again", lambda: "it is started again" in log.read_text())
    steps = len(metrics(out))
    wait_for("and going on", lambda: len(metrics(out)) > steps + 5)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(r"Data worker \d \(process \d+\) was killed by SIGKILL while it read .*\.jpg", errors)
    assert f"{gone.name} (FileNotFoundError" in errors
    assert f"{changed.name} (UnidentifiedImageError" in errors
    assert ending(out)["code"] == 1


@pytest.mark.parametrize("kind", ["only text", "excluded"])
def test_a_folder_without_images_is_an_error_before_anything_else(tmp_path, kind, photographs):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "notes.txt").write_text("no image")
    if kind == "excluded":
        photographs["coffee"].resize((40, 40)).save(folder / "one.jpg")
        (folder / ".fastmim-exclude.txt").write_text("one.jpg\n")
    refused = train(tmp_path / "run", data__root=folder, img_size=32)
    assert refused.returncode == 2
    assert ("excludes all 1 images" if kind == "excluded" else "no images under") in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
