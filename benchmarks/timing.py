"""Interleaved timing: candidate and baseline take turns in one process, so that noise hits both alike."""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

_SHORTEST_SAMPLE_MS = 0.5  # on a CPU a shorter call is repeated within a sample
_MIN_ROUNDS, _MAX_ROUNDS = 5, 500

Call = Callable[[int], Any]  # the argument says which set of inputs to take


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0 to 100), linear between neighbours; 50 is the median."""
    if not values:
        raise ValueError("percentile of no values: a benchmark needs at least one round")
    ordered = sorted(values)
    at = (len(ordered) - 1) * q / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


class Clock(Protocol):
    """Takes samples that are read together at the end, so that a GPU is never waited for in between."""

    def sample(self, call: Call, index: int, repeat: int) -> Any: ...

    def read(self, sample: Any) -> float:
        """Milliseconds of one call."""
        ...


class CpuClock:
    """Wall time."""

    def sample(self, call: Call, index: int, repeat: int) -> float:
        start = time.perf_counter_ns()
        for i in range(repeat):
            call(index + i)
        return (time.perf_counter_ns() - start) / repeat / 1e6

    def read(self, sample: float) -> float:
        return sample


class CudaClock:
    """CUDA events around a call, after a flush of the L2 cache; the flush also gives the host time to run ahead."""

    def __init__(self, device: torch.device) -> None:
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(size, 2**28) // 4, dtype=torch.float32, device=device)

    def sample(self, call: Call, index: int, repeat: int) -> tuple[Any, Any, int]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.fill_(1.0)
        start.record()
        for i in range(repeat):
            call(index + i)
        end.record()
        return start, end, repeat

    def read(self, sample: tuple[Any, Any, int]) -> float:
        start, end, repeat = sample
        end.synchronize()
        return start.elapsed_time(end) / repeat


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def order(round_index: int, sides: int) -> list[int]:
    """Who goes first alternates: A B, B A, A B, ... so that neither always runs on the other's warm or cold caches."""
    turn = list(range(sides))
    return turn if round_index % 2 == 0 else turn[::-1]


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def interleave(
    calls: Sequence[Call], clock: Clock, seconds: float, rounds: int | None = None, warmup: int = 3
) -> list[list[float]]:
    """Milliseconds of every sample of every call, taken in alternating order.

    Args:
        calls: what to time; each takes a counter, by which it may rotate among sets of inputs.
        clock: CpuClock, CudaClock, or a test's own.
        seconds: about how long all samples together may take; sets the number of rounds.
        rounds: the number of rounds, when it should not follow from `seconds`.
        warmup: calls of each before anything counts, at least 1.

    Returns:
        One list of samples for each call. Sample i of all calls was taken in round i.
    """
    with _no_garbage_collection():
        estimate = [min(clock.read(clock.sample(call, i, 1)) for i in range(max(1, warmup))) for call in calls]
        on_cpu = isinstance(clock, CpuClock)
        repeats = [
            max(1, min(1000, math.ceil(_SHORTEST_SAMPLE_MS / max(ms, 1e-6)))) if on_cpu else 1 for ms in estimate
        ]
        if rounds is None:
            round_ms = sum(ms * repeat for ms, repeat in zip(estimate, repeats, strict=True))
            rounds = max(_MIN_ROUNDS, min(_MAX_ROUNDS, round(seconds * 1e3 / max(round_ms, 1e-6))))
        samples: list[list[Any]] = [[] for _ in calls]
        for i in range(rounds):
            for side in order(i, len(calls)):
                samples[side].append(clock.sample(calls[side], i * repeats[side], repeats[side]))
        return [[clock.read(sample) for sample in taken] for taken in samples]
