"""A long run under watch: python -m benchmarks.soak --minutes 10 [--json FILE] [-- --key value ...].

Starts the real training command on a folder of JPEGs, with data workers, checkpoints, pictures and TensorBoard, and
looks every few seconds at all of its processes: memory, open files, threads, and how fast it is. What grows, leaks. The
figures are those of the second half, when everything has been done at least once: how much a straight line rises over
that time, in per cent of the mean. Memory goes up and down within each step, so the line is laid through the highest
looks of twenty equal parts of that time, and through their mean speed. Ctrl-C at the end, as a person would.

Options after -- are those of python -m fastmim.train.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ceilings import hardware
from benchmarks.photographs import write_photographs

IMAGES = 400
RUN = {
    "method": "mae",
    "model": "vit_tiny_patch16_224",
    "img_size": 128,
    "batch_size": 32,
    "epochs": 1_000_000,
    "data.workers": 2,
    "optim.warmup_steps": 10,
    "engine.checkpoint_every": 50,
    "log.every": 5,
    "log.pictures_every": 25,
    "log.progress": "none",
}
WATCHED = ("memory_mb", "largest_mb", "files", "threads", "processes", "images_per_second")
MAY_NOT_GROW = ("memory_mb", "largest_mb", "files", "threads", "processes")
_PARTS, _LEAST = 20, 4  # parts of the second half, and how many looks one has
_BARS = "▁▂▃▄▅▆▇█"


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.partition(":")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, after its first step")
    parser.add_argument("--every", type=float, default=1.0, metavar="SECONDS", help="between two looks")
    parser.add_argument("--limit", type=float, default=1.0, metavar="PERCENT", help="growth that counts as flat")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything there")
    options = parser.parse_args(words[:cut])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "images").mkdir()
        write_photographs(folder / "images", IMAGES)
        samples, ending = soak(folder, 60 * options.minutes, options.every, words[cut + 1 :])
    drift = {name: rise(samples, name) for name in WATCHED}
    flat = all(drift[name] <= options.limit for name in MAY_NOT_GROW)
    show(samples, drift, ending, flat, options.limit)
    if options.json:
        command = "python -m benchmarks.soak " + " ".join(words)
        facts = {
            "command": command,
            "hardware": hardware(torch.device("cpu")),
            "drift_percent": drift,
            "flat": flat,
            **ending,
        }
        options.json.write_text(json.dumps({**facts, "samples": samples}, indent=1) + "\n", encoding="utf-8")
    return 0 if flat and ending["exit_code"] == 130 else 1


def soak(folder: Path, seconds: float, every: float, extra: Sequence[str]) -> tuple[list[dict[str, float]], dict]:
    """Train for so long; returns the samples, and how it ended."""
    out = folder / "run"
    settings = RUN | {"data.root": folder / "images", "out": out}
    words = [*(f"--{key}={value}" for key, value in settings.items()), *extra]
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen([sys.executable, "-m", "fastmim.train", *words], stdout=output, stderr=output)
        samples: list[dict[str, float]] = []
        try:
            while not steps_of(out) and process.poll() is None:
                time.sleep(0.1)
            began = time.monotonic()
            while (passed := time.monotonic() - began) < seconds and process.poll() is None:
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one of them has just ended
                    samples.append({"seconds": round(passed, 1), **look(process.pid), **speed(out)})
                time.sleep(every)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            code = process.wait(60)
    if code != 130:
        print((folder / "output.txt").read_text(), file=sys.stderr)
    done = steps_of(out)
    ending = {"exit_code": code, "steps": done[-1]["step"] if done else 0, "losses": losses(done)}
    return samples, ending


def look(pid: int) -> dict[str, float]:
    """All processes of the run. Memory is what they allocated, programs' files left out, which other programs map too;
    a page that three of them share since a fork counts a third for each."""
    family = [pid, *children(pid)]
    memory = [sum(number(member, "smaps_rollup", f"Pss_{kind}:") for kind in ("Anon", "Shmem")) for member in family]
    return {
        "memory_mb": round(sum(memory) / 1024, 1),
        "largest_mb": round(max(number(member, "status", "RssAnon:") for member in family) / 1024, 1),
        "files": sum(len(os.listdir(f"/proc/{member}/fd")) for member in family),
        "threads": sum(number(member, "status", "Threads:") for member in family),
        "processes": len(family),
    }


def children(pid: int) -> list[int]:
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
            found += [int(child), *children(int(child))]
    return found


def number(pid: int, file: str, name: str) -> int:
    """Of the line "NAME: number" in /proc/PID/FILE; memory is in kB there."""
    return next(
        int(line.split()[1]) for line in Path(f"/proc/{pid}/{file}").read_text().splitlines() if line.startswith(name)
    )


def steps_of(out: Path) -> list[dict[str, Any]]:
    try:
        whole = (out / "metrics.jsonl").read_text(encoding="utf-8").rpartition("\n")[0]
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in whole.splitlines()]


def speed(out: Path) -> dict[str, float]:
    """Of the newest logged steps."""
    return {"images_per_second": steps_of(out)[-1]["images_per_second"]}


def losses(steps: list[dict[str, Any]]) -> list[float]:
    """Of the first and the last ten logged steps, on average: it has learned meanwhile."""
    ends = [steps[:10], steps[-10:]]
    return [round(float(np.mean([step["loss"] for step in end])), 4) for end in ends if end]


def rise(samples: list[dict[str, float]], name: str) -> float:
    """Per cent by which it grows over the second half, along a straight line."""
    half = np.array([sample[name] for sample in samples[len(samples) // 2 :]])
    if len(half) < _LEAST:
        return float("nan")
    parts = np.array_split(half, min(_PARTS, len(half) // _LEAST + 1))
    values = np.array([part.mean() if name == "images_per_second" else part.max() for part in parts])
    slope = np.polyfit(np.linspace(0, 1, len(values)), values, 1)[0] if len(values) > 1 else 0.0
    return round(float(100 * slope / values.mean()), 2)


def show(
    samples: list[dict[str, float]], drift: dict[str, float], ending: dict[str, Any], flat: bool, limit: float
) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{samples[-1]['seconds'] / 60:.1f} minutes, {ending['steps']} steps" if samples else None)
    for column in ("", "over time", "first", "second half: mean", "least", "most", "rise"):
        table.add_column(column, justify="left" if column in ("", "over time") else "right")
    for name in WATCHED if samples else ():
        values = [sample[name] for sample in samples]
        half = values[len(values) // 2 :]
        numbers = (values[0], float(np.mean(half)), min(half), max(half))
        table.add_row(name, spark(values), *(f"{number:,.6g}" for number in numbers), f"{drift[name]:+.2f} %")
    console = Console(width=max(120, Console().width))
    console.print(table)
    console.print(f"loss {' -> '.join(map(str, ending['losses']))}; exit code {ending['exit_code']} (Ctrl-C: 130)")
    console.print(f"{'flat' if flat else 'NOT FLAT'}: memory, files and threads may rise by {limit:g} %")


def spark(values: Sequence[float], width: int = 40) -> str:
    """A line of bars, from the least to the most."""
    parts = [float(np.mean(part)) for part in np.array_split(np.array(values), min(width, len(values)))]
    low, high = min(parts), max(parts)
    return "".join(_BARS[round((part - low) / (high - low) * 7) if high > low else 0] for part in parts)


if __name__ == "__main__":
    raise SystemExit(main())
