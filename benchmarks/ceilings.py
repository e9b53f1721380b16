"""What this machine can do, measured in this process: copy bandwidth and matrix-product rate (the roofline)."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from fastmim.ops import linear


@functools.cache
def copy_bytes_per_second(device: torch.device, quick: bool = False) -> float:
    """Bytes read plus bytes written per second by a large copy (far larger than the caches; the best of several)."""
    elements = (2**28 if device.type == "cuda" else 2**25 if not quick else 2**23) // (4 if quick else 1)
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    seconds = _best_seconds(lambda: target.copy_(source), device, 3 if quick else 10)
    return 2 * source.numel() * source.element_size() / seconds


@functools.cache
def matmul_flops_per_second(device: torch.device, dtype: torch.dtype, quick: bool = False) -> float:
    """Floating-point operations per second of a large square matrix product of random numbers (the best of several), by
    whichever of torch's libraries is the faster: the ceiling is the machine's, not that of one of them."""
    side = (8192 if device.type == "cuda" else 2048) // (8 if quick else 1)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = 3 if quick else 10
    seconds = min(_best_seconds(product, device, times) for product in (lambda: a @ b, lambda: linear(a, b)))
    return 2 * side**3 / seconds


def _best_seconds(call: Callable[[], Any], device: torch.device, times: int) -> float:
    call()
    best = float("inf")
    for _ in range(times):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - begin)
    return best


def hardware(device: torch.device) -> str:
    """The name of what was measured: the GPU's, or the processor's with the number of threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}, {torch.backends.cpu.get_cpu_capability()}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        name = ""
    return name or "CPU"
