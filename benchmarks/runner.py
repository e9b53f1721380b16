"""The one runner: checks that both sides agree, times them interleaved, measures memory, and makes rows.

A benchmark file imports from here: `from benchmarks.runner import Case, Settings, Side`, and defines
`cases(settings: Settings) -> Iterable[Case]`. Everything else is done for it.
"""

import gc
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, Case, Settings, Side, backends_here, dtype_name
from benchmarks.ceilings import copy_bytes_per_second, hardware, matmul_flops_per_second
from benchmarks.memory import peak_bytes
from benchmarks.rows import KEYS, Row, read_rows, write_rows
from benchmarks.timing import clock_for, interleave, percentile

__all__ = [
    "DTYPES",
    "KEYS",
    "BenchmarkError",
    "Case",
    "Row",
    "Settings",
    "Side",
    "backends_here",
    "dtype_name",
    "read_rows",
    "run_case",
    "run_cases",
    "write_rows",
]

_MOST_INPUT_SETS = 8


class BenchmarkError(RuntimeError):
    """The sides disagree, or one of them wrote no number: a time for that would mean nothing."""


def run_cases(
    cases: Iterable[Case], settings: Settings, on_row: Callable[[Row], None] = lambda row: None
) -> tuple[list[Row], list[str]]:
    """Runs all cases. A case that fails does not stop the others.

    Returns:
        The rows, and one sentence for each case that failed.
    """
    rows, failures = [], []
    for case in cases:
        try:
            for row in run_case(case, settings):
                rows.append(row)
                on_row(row)
        except (BenchmarkError, RuntimeError, ValueError, NotImplementedError, TypeError) as error:
            failures.append(f"{case.op} {case.case} {dtype_name(case.dtype)} {case.candidate.name}: {error}")
    return rows, failures


def run_case(case: Case, settings: Settings) -> Iterator[Row]:
    """One row for each pass of the case."""
    _gradients.clear()
    gc.collect()  # what the case before left behind
    torch.manual_seed(0)
    sets = _input_sets(case, settings.device)
    if "step" not in case.passes:
        _check_agreement(case, sets[0])
    clock = clock_for(settings.device)
    sides = [case.candidate] + ([case.baseline] if case.baseline is not None else [])
    for name in case.passes:
        calls = [_call(side, name, sets) for side in sides]
        times = interleave(calls, clock, settings.seconds, settings.rounds, settings.warmup)
        peaks = [
            peak_bytes(lambda call=call: call(0), settings.device) + side.resident_bytes  # type: ignore[misc]
            for call, side in zip(calls, sides, strict=True)
        ]
        yield _row(case, name, times, peaks, settings)


def _input_sets(case: Case, device: torch.device) -> list[tuple[Any, ...]]:
    """One set on a CPU; on a GPU enough sets that they do not fit into its L2 cache together."""
    sets = [case.inputs()]
    if device.type == "cuda":
        size = sum(t.numel() * t.element_size() for t in sets[0] if isinstance(t, Tensor))
        wanted = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        while size and len(sets) * size < wanted and len(sets) < _MOST_INPUT_SETS:
            sets.append(case.inputs())
    return sets


def _tensors(result: Any) -> list[Tensor]:
    results = result if isinstance(result, (tuple, list)) else (result,)
    return [r for r in results if isinstance(r, Tensor)]


def _forward(side: Side, inputs: tuple[Any, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """Runs the side forward and returns the backward pass that belongs to it."""
    outputs = [o for o in _tensors(side.run(*inputs)) if o.requires_grad]
    wanted = [i for i in inputs if isinstance(i, Tensor) and i.requires_grad]
    if not outputs or not wanted:
        raise BenchmarkError(
            f"{side.name}: nothing to differentiate; give an input requires_grad, or time 'forward' only"
        )
    weights = [_output_gradient(o) for o in outputs]
    return lambda: torch.autograd.grad(outputs, wanted, weights, retain_graph=True, allow_unused=True)


_gradients: dict[tuple[Any, ...], Tensor] = {}


def _output_gradient(output: Tensor) -> Tensor:
    """Random and the same for both sides; made once, so that making it is not timed. One for a scalar loss."""
    key = (output.shape, output.dtype, output.device)
    if key not in _gradients:
        generator = torch.Generator(output.device).manual_seed(1)
        _gradients[key] = (
            torch.ones_like(output)
            if output.dim() == 0
            else torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype)
        )
    return _gradients[key]


def _call(side: Side, pass_name: str, sets: list[tuple[Any, ...]]) -> Callable[[int], Any]:
    if pass_name in ("forward", "step"):
        return lambda i: side.run(*sets[i % len(sets)])
    if pass_name == "both":
        return lambda i: _forward(side, sets[i % len(sets)])()
    backwards = [_forward(side, inputs) for inputs in sets]
    return lambda i: backwards[i % len(backwards)]()


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fills every uninitialised tensor with NaN, so that an output element that a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = fill


def _check_agreement(case: Case, inputs: tuple[Any, ...]) -> None:
    """Both sides must compute the same thing, outputs and gradients, with poisoned memory."""
    tolerance = case.relative_tolerance()

    def results(side: Side) -> list[Tensor]:
        outputs = _tensors(side.run(*inputs))
        differentiable = any(p in case.passes for p in ("backward", "both"))
        return outputs + (list(_forward(side, inputs)()) if differentiable else [])

    with _poisoned_memory():
        ours = results(case.candidate)
        theirs = results(case.baseline) if case.baseline is not None else None
    for i, mine in enumerate(ours):
        if not _finite(mine) and (theirs is None or _finite(theirs[i])):
            raise BenchmarkError(f"result {i} of {case.candidate.name} is not finite (an element left unwritten?)")
    if theirs is None or tolerance is None:
        return
    if len(ours) != len(theirs):
        raise BenchmarkError(f"{case.candidate.name} gives {len(ours)} results, {case.baseline.name} {len(theirs)}")  # type: ignore[union-attr]
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine is None or other is None:
            continue
        error = _relative_error(mine, other)
        if error > tolerance:
            raise BenchmarkError(
                f"result {i} differs from {case.baseline.name} by {error:.2g}, more than {tolerance:.2g}"  # type: ignore[union-attr]
            )


def _finite(tensor: Tensor | None) -> bool:
    return tensor is None or bool(tensor.isfinite().all())


def _relative_error(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        raise BenchmarkError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def _row(case: Case, pass_name: str, times: list[list[float]], peaks: list[int], settings: Settings) -> Row:
    ms = percentile(times[0], 50)
    row: Row = {
        "op": case.op,
        "case": case.case,
        "pass": pass_name,
        "dtype": dtype_name(case.dtype),
        "backend": case.candidate.name,
        "ms": ms,
        "baseline": None,
        "baseline_ms": None,
        "ratio": None,
        "peak_mb": peaks[0] / 2**20,
        "baseline_peak_mb": None,
        "p20": percentile(times[0], 20),
        "p80": percentile(times[0], 80),
        "rounds": len(times[0]),
    }
    if case.baseline is not None:
        baseline_ms = percentile(times[1], 50)
        paired = [theirs / ours for ours, theirs in zip(*times, strict=True)]
        row |= {
            "baseline": case.baseline.name,
            "baseline_ms": baseline_ms,
            "ratio": baseline_ms / ms,
            "baseline_peak_mb": peaks[1] / 2**20,
            "baseline_p20": percentile(times[1], 20),
            "baseline_p80": percentile(times[1], 80),
            "ratio_p20": percentile(paired, 20),
            "ratio_p80": percentile(paired, 80),
        }
    if case.mask_ratio is not None:
        row["mask_ratio"] = case.mask_ratio
    if case.images:
        row["images_per_second"] = case.images / ms * 1e3
        if case.baseline is not None:
            row["baseline_images_per_second"] = case.images / row["baseline_ms"] * 1e3
    row |= _roofline(case, pass_name, ms, settings)
    row |= {"hardware": hardware(settings.device), "torch": torch.__version__}
    return row | {"load_average": os.getloadavg()[0]} if hasattr(os, "getloadavg") else row


def _roofline(case: Case, pass_name: str, ms: float, settings: Settings) -> Row:
    """GB/s and GFLOP/s of what must be moved and computed, and how close the larger of the two comes to its ceiling."""
    seconds, floors = ms / 1e3, []
    found: Row = {}
    if pass_name in case.moved:
        ceiling = copy_bytes_per_second(settings.device, settings.quick)
        found |= {"gb_per_s": case.moved[pass_name] / seconds / 1e9, "ceiling_gb_per_s": ceiling / 1e9}
        floors.append(case.moved[pass_name] / ceiling)
    if pass_name in case.flops:
        ceiling = matmul_flops_per_second(settings.device, case.dtype, settings.quick)
        found |= {"gflop_per_s": case.flops[pass_name] / seconds / 1e9, "ceiling_gflop_per_s": ceiling / 1e9}
        floors.append(case.flops[pass_name] / ceiling)
    if floors:
        found |= {"floor_ms": max(floors) * 1e3, "roofline": max(floors) / seconds}
    return found
