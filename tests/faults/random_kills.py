"""Kill -9 a training run at random moments; after each, the newest checkpoint must be whole.

    python -m tests.faults.random_kills FOLDER plain|sharded ROUNDS

Sharded checkpoints are written by a thread while training goes on.
Each round is a forked child of this process, which has imported everything and computed nothing, so rounds are short.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # the optimiser would import it in every child, for seconds

import fastmim.engine.sharded_checkpoint  # noqa: F401  (likewise)
from fastmim.engine.checkpoint import CheckpointStore, read_checkpoint
from tests.engine.tiny_run import read_metrics, tiny_run

ENGINE = {"checkpoint_every": 1, "device": "cpu", "precision": "fp32"}


def train_until_killed(out: Path, form: str, seconds_after_start: float) -> None:
    before = newest(out)
    child = os.fork()
    if child == 0:
        try:
            silence()
            tiny_run(out, total=100_000, engine={**ENGINE, "checkpoint": form})
        finally:
            os._exit(1)  # not reached by a killed run
    deadline = time.monotonic() + 30
    while newest(out) <= before and time.monotonic() < deadline:  # wait until it has saved at least once more
        time.sleep(0.002)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), f"the run ended by itself, see {out / 'train.log'}"
    time.sleep(seconds_after_start)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def silence() -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)


def newest(out: Path) -> int:
    """Step of the newest checkpoint folder, not verified."""
    steps = CheckpointStore(out / "checkpoints").steps() if out.exists() else []
    return int(steps[-1].name.removeprefix("step-")) if steps else 0


def main(folder: Path, form: str, rounds: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(0)
    out = folder / "run"
    torn = 0
    for _ in range(rounds):
        train_until_killed(out, form, draw.uniform(0, 0.03))
        torn += any((out / "checkpoints").glob(".tmp-*"))
        for path in CheckpointStore(out / "checkpoints").steps():
            read_checkpoint(path)  # raises if it is not whole
    done = newest(out)
    steps = [line["step"] for line in read_metrics(out) if line["step"] <= done]
    assert steps == list(range(1, done + 1)), "each step once, whatever was repeated"
    assert not any((out / "checkpoints").glob("damaged-*"))
    print(f"{rounds} kills, {torn} of them inside a save, {done} steps")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
