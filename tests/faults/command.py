"""Runs of the real command on the digits, small enough for many of them, with faults injected."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOTAL, EVERY = 12, 4

_SETTINGS = {
    "method": "mae",
    "model": "vit_tiny_patch16_224",
    "model.patch_size": 8,
    "model.drop_path_rate": 0.2,
    "model.kwargs": '{"depth": 2, "embed_dim": 48}',
    "method.decoder_depth": 1,
    "method.decoder_dim": 32,
    "method.decoder_num_heads": 2,
    "max_steps": TOTAL,
    "batch_size": 16,
    "seed": 3,
    "data.workers": 0,
    "optim.lr": 1e-3,
    "optim.warmup_steps": 3,
    "engine.checkpoint_every": EVERY,
    "engine.device": "cpu",
    "log.every": 1,
    "log.tensorboard": "false",
}


def start(
    out: Path,
    *,
    inject: str = "",
    processes: int = 1,
    restarts: int = 0,
    under: Sequence[str] = (),
    module: str = "fastmim.train",
    **settings: Any,
) -> "subprocess.Popen[str]":
    """The training command; settings with __ for dots, None to leave one out.

    Args:
        processes: more than one are torchrun's.
        under: words before the command: of a program that runs it in circumstances of its own.
        module: what is run in place of `fastmim.train`, with its arguments.
    """
    arguments = words_for(out, **settings)
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]
    return subprocess.Popen(
        [*under, sys.executable, "-m", *([*launcher, "-m"] if processes > 1 else []), module, *arguments],
        env=_environment(inject),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def words_for(out: Path, **settings: Any) -> list[str]:
    """The words after the command; settings as for `start`."""
    merged = _SETTINGS | {key.replace("__", "."): value for key, value in settings.items()} | {"out": out}
    return [f"--{key}={value}" for key, value in merged.items() if value is not None]


def _environment(inject: str = "") -> dict[str, str]:
    return os.environ | {"FASTMIM_INJECT": inject, "OMP_NUM_THREADS": "1"}


def run(module: str, *words: object, inject: str = "") -> "subprocess.CompletedProcess[str]":
    """Another command of the package, to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        env=_environment(inject),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def in_a_namespace(*flags: str) -> list[str]:
    """Words to run a command in Linux namespaces of its own: unshare(1). Skips the test where that is not allowed."""
    words = ["unshare", "--map-root-user", *flags]
    try:
        done = subprocess.run([*words, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs unshare(1)")
    if done.returncode:
        pytest.skip(f"unshare is not allowed here: {done.stderr.strip()}")
    return words


def train(out: Path, **settings: Any) -> "subprocess.CompletedProcess[str]":
    """The training command, to its end; arguments are those of `start`."""
    process = start(out, **settings)
    try:
        output, errors = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on time."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in lines]


def ending(out: Path) -> dict[str, Any]:
    return json.loads((out / "exit.json").read_text())


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())
