"""Peak memory of one call, above what was resident before it: measured, in a call that is not timed."""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that `call` adds at its highest point; its inputs, being resident before, do not count.

    On CUDA: torch's allocator. On a CPU: the kernel's high-water mark of resident memory (Linux), which sees every
    allocation, also those of compiled kernels; elsewhere: torch's own allocations.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        return _resident_peak(call)
    except OSError:
        return _allocator_peak(call)


def _status_bytes(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _resident_peak(call: Callable[[], Any]) -> int:
    _release_free_memory()
    _CLEAR_REFS.write_text("5")  # resets the high-water mark; OSError where the system does not offer it
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _release_free_memory() -> None:
    """Gives freed heap pages back to the system, so that a call that takes them again is seen to do so."""
    with suppress(OSError, AttributeError):  # not glibc: the peak may then read low
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _allocator_peak(call: Callable[[], Any]) -> int:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak
