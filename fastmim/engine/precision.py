"""Which precision a run computes in, and why."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

_CPU_BF16 = ("amx_bf16", "avx512_bf16")


def choose_device(wanted: str, local_rank: int | None = None) -> torch.device:
    """The device for "auto", "cpu" or "cuda"; with `local_rank` that of this process among those of its machine.

    Raises:
        ValueError: CUDA was asked for and cannot be used, or a machine has fewer GPUs than processes.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        reason = "torch finds no usable GPU or driver" if built else "this torch is built without CUDA"
        raise ValueError(
            f"engine.device: cuda was asked for, but {reason}; engine.device=cpu or auto trains on the CPU"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank is not None:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"engine.device: this machine has {torch.cuda.device_count()} GPUs, none is left for its process "
                f"{local_rank} (LOCAL_RANK, counted from 0); start one process per GPU"
            )
        torch.cuda.set_device(local_rank)
    return torch.device("cuda", torch.cuda.current_device())


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """("bf16" or "fp32", the reason as a phrase for the log)."""
    if wanted != "auto":
        return wanted, "as asked for"
    if device.type == "cuda":
        name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        if major >= 8:
            return "bf16", f"{name} computes it on tensor cores"
        return "fp32", f"{name} (compute capability {major}.{minor}) has no bf16 tensor cores"
    found = next((flag for flag in _CPU_BF16 if flag in _cpu_flags()), None)
    if found:
        return "bf16", f"this CPU has {found}"
    return "fp32", f"this CPU has none of {', '.join(_CPU_BF16)}"


def autocast(precision: str, device: torch.device, *, cache: bool = True) -> AbstractContextManager:
    """The context of a forward pass. Losses and Fourier transforms cast to fp32 themselves.

    `cache`: keep a weight's bf16 copy for its second use. A captured step must not: its copies belong to the graph.
    """
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=cache)


def _cpu_flags() -> frozenset[str]:
    """Instruction-set flags of the first processor, as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())
