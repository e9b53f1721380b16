"""What a benchmark declares: a case (candidate, baseline, inputs), and the settings that it is asked to fit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
PASSES = ("forward", "backward", "both", "step")


def dtype_name(dtype: torch.dtype) -> str:
    """The short name that rows and options use: fp32, bf16, fp16, fp64."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Settings:
    """What the command asks of every benchmark; a benchmark's `cases(settings)` yields the cases that fit."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    quick: bool = False
    """Smoke test: a benchmark yields one or two tiny cases, each well under a second."""
    seconds: float = 3.0
    """Time to spend on each case and pass, warm-up excluded."""
    rounds: int | None = None
    """Fixed number of interleaved rounds, instead of `seconds`."""
    warmup: int = 3
    """Calls of each side before anything counts."""
    mask_ratios: tuple[float, ...] | None = None
    """Removed shares to measure, in place of a benchmark's own MASK_RATIOS."""


def backends_here(op: str, settings: Settings, dtype: torch.dtype) -> list[str]:
    """Names of the backends worth timing for an operation: the compiled ones that run here, else the reference."""
    import fastmim.ops  # noqa: F401  (registers the operations)
    from fastmim.ops.backends import operations

    if op not in operations():
        raise ValueError(f"{op} is not a registered operation; known: {', '.join(operations())}")
    backends = operations()[op]
    names = ["cpu"] if settings.device.type == "cpu" else ["cuda", "triton"]  # interpreted Triton is for tests only
    return [name for name in names if not backends.why_not(name, settings.device.type, dtype)] or ["reference"]


@dataclass(frozen=True)
class Side:
    """One of the two things compared: a name and a callable.

    For the passes forward, backward and both, `run(*inputs)` returns a tensor or a tuple of tensors; those that require
    a gradient are differentiated. For the pass step, `run(*inputs)` does everything and its result is ignored.
    """

    name: str
    run: Callable[..., Any]
    resident_bytes: int = 0
    """What this side keeps between calls (weights, optimiser state): added to the peak memory of its calls."""


@dataclass(frozen=True)
class Case:
    """One line of a benchmark: the same inputs given to the candidate (ours) and to the baseline (plain PyTorch)."""

    op: str
    case: str
    """Shapes and options in a few words, such as "B64 224px p16 norm_pix"."""
    candidate: Side
    """Its name is the backend in the row: reference, cpu, triton, cuda or auto."""
    baseline: Side | None
    inputs: Callable[[], tuple[Any, ...]]
    """Makes one fresh set of random inputs (never zeros) on `settings.device`. A backward pass differentiates those
    with requires_grad. Called several times on a GPU, so that the sets rotate through more than its L2 cache holds."""
    dtype: torch.dtype = torch.float32
    passes: tuple[str, ...] = ("forward", "backward", "both")
    tolerance: float | str | None = "auto"
    """Before timing, outputs and gradients of both sides must agree to this relative error (norm of the difference over
    norm). "auto": 1e-4 in fp32, 3e-2 in half precision. None: not compared, since the two draw other random numbers."""
    mask_ratio: float | None = None
    """Removed share of the cells, exactly, where the case has a mask of tiles."""
    images: int = 0
    """Images handled by a call; gives images_per_second when not 0."""
    moved: Mapping[str, int] = field(default_factory=dict)
    """Fewest bytes that must move through memory, by pass: {"forward": ..., "both": ...}. Gives GB/s and roofline."""
    flops: Mapping[str, int] = field(default_factory=dict)
    """Floating-point operations of a pass, by pass. Gives GFLOP/s and roofline."""

    def __post_init__(self) -> None:
        unknown = [p for p in self.passes if p not in PASSES]
        if unknown or not self.passes:
            raise ValueError(f"{self.op} {self.case}: passes are {', '.join(PASSES)}; got {self.passes}")
        if "step" in self.passes and len(self.passes) > 1:
            raise ValueError(
                f"{self.op} {self.case}: 'step' does everything itself and stands alone; got {self.passes}"
            )

    def relative_tolerance(self) -> float | None:
        if self.tolerance == "auto":
            return 3e-2 if self.dtype in (torch.bfloat16, torch.float16) else 1e-4
        return None if self.tolerance is None else float(self.tolerance)
