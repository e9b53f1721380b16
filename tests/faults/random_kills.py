"""Kill -9 the training command at random moments; after each, the newest checkpoint must be whole, and what all of the
runs together did must be what one that nobody killed does.

    python -m tests.faults.random_kills FOLDER plain|sharded ROUNDS

Each round is `fastmim.train` on the digits in a forked child of this process, which has imported everything and
computed nothing: so a start takes a fraction of a second. It saves after each step, so that many kills fall into a
save; sharded checkpoints are written by a thread while training goes on.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # the optimiser would import it in every child, for seconds

import fastmim.data.digits
import fastmim.engine.sharded_checkpoint
import fastmim.evaluation
import fastmim.methods.mae
import fastmim.models  # noqa: F401  (all of them likewise)
from fastmim import train
from fastmim.engine.checkpoint import CheckpointStore, read_checkpoint
from tests.faults.command import metrics, words_for

MANY = 100_000  # steps: no run comes to its end by itself


def train_until_killed(out: Path, form: str, until: int, seconds_more: float) -> None:
    """A run that is killed some time after its checkpoint of step `until`."""
    child = os.fork()
    if child == 0:
        try:
            silence(out.with_suffix(".txt"))
            settings = {"engine__checkpoint": form, "engine__checkpoint_every": 1, "optim__schedule": "constant"}
            train.main(words_for(out, max_steps=MANY, **settings))
        finally:
            os._exit(1)  # not reached by a killed run
    deadline = time.monotonic() + 60
    while newest(out) < until and time.monotonic() < deadline:
        time.sleep(0.002)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), (
            f"ended by itself: {out.with_suffix('.txt').read_text()[-2000:]}"
        )
    time.sleep(seconds_more)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def silence(file: Path) -> None:
    """What the child prints goes there."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)


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
        train_until_killed(out, form, newest(out) + 1, draw.uniform(0, 0.1))  # once it has saved at least once more
        torn += any((out / "checkpoints").glob(".tmp-*"))
        for path in CheckpointStore(out / "checkpoints").steps():
            read_checkpoint(path)  # raises if it is not whole
    done = newest(out)
    assert not any((out / "checkpoints").glob("damaged-*"))
    unbroken = folder / "unbroken"
    train_until_killed(unbroken, form, done, 0.0)
    broken, whole = ([line for line in metrics(run) if line["step"] <= done] for run in (out, unbroken))
    assert [line["step"] for line in broken] == list(range(1, done + 1)), "each step once, whatever was repeated"
    assert broken == whole
    print(f"{rounds} kills, {torn} of them inside a save, {done} steps like those of an unbroken run")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
