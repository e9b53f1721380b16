import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from fastmim.data import DataConfig, TrainLoader, WorkerError, create_source
from fastmim.data.pipeline import Made
from fastmim.data.workers import InProcess, WorkerPool, _Slots

SHAPE = (7, 1, 2, 2)


def numbered(out: np.ndarray, epoch: int, index: int) -> Made:
    out[...] = 10 * epoch + index
    return Made(index, ())


def deadly(out: np.ndarray, epoch: int, index: int) -> Made:
    if index == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return numbered(out, epoch, index)


def deadly_once(out: np.ndarray, epoch: int, index: int) -> Made:
    if index == 5 and not os.path.exists(os.environ["DIED"]):
        open(os.environ["DIED"], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return numbered(out, epoch, index)


def broken(out: np.ndarray, epoch: int, index: int) -> Made:
    if index == 5:
        raise RuntimeError("a bug of ours")
    return numbered(out, epoch, index)


def tasks(step: int) -> list[tuple[int, int]]:
    return [(step, index) for index in range(7)]


def values(batches: InProcess | WorkerPool, steps: int) -> list[list[int]]:
    for step in range(batches.ahead):
        batches.ask(tasks(step))
    seen = []
    for step in range(steps):
        rows, made = batches.take()
        assert [row.image for row in made] == list(range(7))
        seen.append(rows[:, 0, 0, 0].tolist())
        batches.ask(tasks(step + batches.ahead))
    return seen


EXPECTED = [[10 * step + index for index in range(7)] for step in range(6)]


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("ahead", [1, 3])
def test_batches_come_in_order_and_whole(workers, ahead):
    pool = WorkerPool(numbered, SHAPE, workers, ahead)
    try:
        assert values(pool, 6) == EXPECTED == values(InProcess(numbered, SHAPE), 6)
    finally:
        pool.close()


def test_a_short_last_batch():
    pool = WorkerPool(numbered, SHAPE, workers=3, ahead=2)
    pool.ask([(0, 4)])
    pool.ask([])
    rows, made = pool.take()
    assert rows.shape == (1, *SHAPE[1:])
    assert made == [Made(4, ())]
    assert pool.take()[1] == []
    pool.close()


def test_a_killed_worker_is_restarted_once_and_its_work_made_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    pool = WorkerPool(deadly_once, SHAPE, workers=2, ahead=3, paths=lambda index: f"image {index}")
    try:
        assert values(pool, 6) == EXPECTED
    finally:
        pool.close()
    assert "was killed by SIGKILL while it read image 5; it is started again" in caplog.text


def test_a_worker_that_dies_again_stops_the_run_by_name():
    pool = WorkerPool(deadly, SHAPE, workers=2, ahead=2, paths=lambda index: f"image {index}")
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"Data worker 1 \(process \d+\) was killed by SIGKILL while it read image 5"):
        values(pool, 6)
    assert time.monotonic() - started < 10
    pool.close()


def test_an_exception_in_a_worker_arrives_with_its_place():
    pool = WorkerPool(broken, SHAPE, workers=2, ahead=2, paths=lambda index: f"image {index}")
    with pytest.raises(WorkerError, match=r"(?s)Data worker 1 failed while it read image 5:.*in broken.*a bug of ours"):
        values(pool, 6)
    pool.close()


def test_close_ends_the_processes(class_folder):
    cfg = DataConfig(root=class_folder, workers=2)
    loader = TrainLoader(create_source(cfg), cfg, (16, 16), 8, 0)
    next(loader)
    processes = [worker.process for worker in loader._batches.rows._workers]
    assert all(process.is_alive() for process in processes)
    loader.close()
    assert not any(process.is_alive() for process in processes)
    loader.close()


def test_a_loader_survives_one_killed_worker(class_folder):
    cfg = DataConfig(root=class_folder, workers=2)
    source = create_source(cfg)
    expected = TrainLoader(source, DataConfig(root=class_folder, workers=0), (16, 16), 8, 0)
    with TrainLoader(source, cfg, (16, 16), 8, 0) as loader:
        for step in range(8):
            if step == 2:
                os.kill(loader._batches.rows._workers[1].process.pid, signal.SIGKILL)
            assert torch.equal(next(loader).images, next(expected).images)


def test_workers_leave_signals_to_the_training_process(class_folder):
    """Ctrl-C and a scheduler's SIGTERM reach the whole group; the batches before the last save are still needed."""
    cfg = DataConfig(root=class_folder, workers=2)
    with TrainLoader(create_source(cfg), cfg, (16, 16), 8, 0) as loader:
        next(loader)
        processes = [worker.process for worker in loader._batches.rows._workers]
        for process in processes:
            os.kill(process.pid, signal.SIGTERM)
            os.kill(process.pid, signal.SIGINT)
        for _ in range(6):
            next(loader)
        assert all(process.is_alive() for process in processes)


SCRIPT = """
    import os, signal, sys
    from fastmim.data import DataConfig, TrainLoader, create_source
    cfg = DataConfig(root=sys.argv[1], workers=2)
    loader = TrainLoader(create_source(cfg), cfg, (16, 16), 8, 0)
    next(loader)
    print(*(worker.process.pid for worker in loader._batches.rows._workers), flush=True)
    {end}
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("end, code", [("pass", 0), ("1 / 0", 1), ("os.kill(os.getpid(), signal.SIGKILL)", -9)])
def test_however_the_training_process_ends_its_workers_end(class_folder, end, code):
    script = textwrap.dedent(SCRIPT.format(end=end))
    done = subprocess.run(
        [sys.executable, "-c", script, str(class_folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_for_batches_does_not_come_from_dev_shm():
    """Containers often have 64 MB there, and a full one kills with SIGBUS."""
    slots = _Slots(2, SHAPE, 1)
    assert os.readlink(f"/proc/self/fd/{slots._shared._file}").startswith("/memfd:")
