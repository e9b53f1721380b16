"""Samples of reading images, of steps, and of both together; `benchmarks.data` makes rows of them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import order
from fastmim.data import DataConfig, RawBatch, ViewSpec, create_loader, create_source, normalise
from fastmim.data.dali_trial import why_not
from fastmim.engine.waiting import DataWait


@dataclass(frozen=True)
class Way:
    """One way to read images: "pillow", "dali cpu" or "dali gpu", with so many processes or threads."""

    name: str
    workers: int

    def __str__(self) -> str:
        unit = "thread" if self.name.startswith("dali") else "worker"
        return f"{self.workers} {unit}{'' if self.workers == 1 else 's'}"


@dataclass(frozen=True)
class Setting:
    """What all samples of a command have in common."""

    folder: Path
    side: int
    batch_size: int
    device: torch.device
    seconds: float
    """Of one sample, start-up not counted."""
    rounds: int

    def views(self, count: int) -> tuple[ViewSpec, ...]:
        """One crop, or three: two large ones and a small one."""
        size, small = (self.side, self.side), (self.side * 3 // 7, self.side * 3 // 7)
        three = ViewSpec("images", size), ViewSpec("second", size), ViewSpec("small", small, scale=(0.05, 0.4))
        return three[:count]


Sample = Callable[[], float]  # milliseconds of one batch or step


def ours(setting: Setting, way: Way, views: int, output: Any) -> Any:
    """A loader as training has it."""
    pipeline, _, device = way.name.partition(" ")
    chosen: dict[str, Any] = {"pipeline": pipeline} | ({"dali_device": device} if device else {})
    cfg = DataConfig(root=setting.folder, workers=way.workers, output=output, **chosen)
    size, specs = (setting.side, setting.side), setting.views(views)
    return create_loader(create_source(cfg), cfg, size, setting.batch_size, 0, views=specs, device=setting.device)


def loading(setting: Setting, start: Callable[[], Any], workers: int) -> Sample:
    """The time of a batch, from a loader in full swing.

    Where each worker makes whole batches, as many as there are workers come at a time: whole turns are counted.
    """
    turn = max(1, workers)

    def sample() -> float:
        loader = start()
        batches = iter(loader)
        try:
            for _ in range(max(3, 2 * turn)):
                next(batches)
            done, began = 0, time.perf_counter()
            while done < 2 or time.perf_counter() - began < setting.seconds:
                for _ in range(turn):
                    next(batches)
                done += turn
            return (time.perf_counter() - began) / done * 1e3
        finally:
            if hasattr(loader, "close"):
                loader.close()

    return sample


def interleaved(samples: Sequence[Sample], rounds: int) -> list[list[float]]:
    """`rounds` samples of each, in alternating order."""
    taken: list[list[float]] = [[] for _ in samples]
    for number in range(rounds):
        for which in order(number, len(samples)):
            taken[which].append(samples[which]())
    return taken


def ways_here(workers: Sequence[int], device: torch.device) -> tuple[list[Way], list[str]]:
    """The ways that work on this machine, and a sentence for each that does not."""
    ways = [Way("pillow", number) for number in workers]
    missing = []
    threads = sorted({number for number in workers if number} or {1})
    for place in ("cpu", "gpu"):
        reason = why_not(place)  # type: ignore[arg-type]
        if place == "gpu" and not reason and device.type != "cuda":
            reason = "the benchmark runs on the CPU"
        if reason:
            missing.append(f"dali {place} is left out: {reason}")
        else:
            ways += [Way(f"dali {place}", number) for number in (threads if place == "cpu" else threads[-1:])]
    return ways, missing


def stepping(setting: Setting, step: Callable[[Tensor], None], images: Tensor) -> Sample:
    """The time of a step on a batch that is there."""

    def sample() -> float:
        step(images)
        synchronise(setting.device)
        done, began = 0, time.perf_counter()
        while done < 2 or time.perf_counter() - began < setting.seconds:
            step(images)
            done += 1
        synchronise(setting.device)
        return (time.perf_counter() - began) / done * 1e3

    return sample


def training(setting: Setting, start: Callable[[], Any], step: Callable[[Tensor], None], waits: list[float]) -> Sample:
    """The time of a step with the loader; the share of the waiting goes to `waits`."""

    def sample() -> float:
        wait, done = DataWait(setting.device), 0
        with start() as loader:
            mean_std = [torch.tensor(values, device=setting.device) for values in (loader.mean, loader.std)]
            began = time.perf_counter()
            while done < 4 or time.perf_counter() - began < setting.seconds:
                if done == 2:  # the loader is in full swing
                    synchronise(setting.device)
                    wait.read()
                    began = time.perf_counter()
                wait.ask()
                raw: RawBatch = next(loader)
                wait.begin()
                images = raw.images.to(setting.device, non_blocking=True)
                step(normalise(images, *mean_std) if images.dtype == torch.uint8 else images)
                wait.end()
                done += 1
            synchronise(setting.device)
            seconds = time.perf_counter() - began
            waits.append(wait.read() / seconds)
            return seconds / (done - 2) * 1e3

    return sample


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
