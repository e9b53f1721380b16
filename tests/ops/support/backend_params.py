"""`@pytest.mark.parametrize("backend", backends_of("op"))`: every backend that this machine can run.

Triton runs on the GPU where there is one, else in its interpreter. The CPU kernel runs once per instruction set. CUDA
kernels run on the GPU where there is one, else emulated on the host, if the operation can be (tests/cuda_emulation).
"""

from typing import Any

import pytest
import torch

import fastmim.ops  # noqa: F401  (registers the operations)
from fastmim.ops.backends import operations
from fastmim.ops.extension import load_extension
from tests.cuda_emulation import EMULATED, host_build


class Backend(str):
    """A backend's name that also knows where its tensors live and which instruction set is asked for."""

    device: str
    isa: str

    def __new__(cls, name: str, device: str = "cpu", isa: str = "") -> "Backend":
        self = super().__new__(cls, name)
        self.device, self.isa = device, isa
        return self

    @property
    def emulated(self) -> bool:
        """A CUDA kernel on CPU tensors."""
        return self.plain == "cuda" and self.device == "cpu"

    @property
    def interpreted(self) -> bool:
        """A Triton kernel on CPU tensors: slow."""
        return self.plain == "triton" and self.device == "cpu"

    @property
    def plain(self) -> str:
        """For torch.compile, which wants exactly a str."""
        return str.__str__(self)

    @property
    def label(self) -> str:
        return f"{self.plain}-{'emulated' if self.emulated else self.isa or self.device}"


def _runnable(backend: Backend, op: str) -> str:
    if backend.emulated:
        return host_build.why_not() if op in EMULATED else f"{op} has no {backend.plain} kernel"
    if reason := operations()[op].why_not(backend.plain, backend.device):
        return reason
    if backend.isa:
        compiled_for = load_extension()[0].build_info()["compiled_for"].split()  # type: ignore[union-attr]
        flags = torch.backends.cpu.get_cpu_capability().lower()
        if backend.isa not in compiled_for or (backend.isa == "avx512" and "avx512" not in flags):
            return f"this processor or build has no {backend.isa}"
    return ""


def backends_of(
    op: str, *, isas: tuple[str, ...] = ("portable", "avx2", "avx512"), reference: bool = True
) -> list[Any]:
    """pytest parameters: the reference, the CPU kernel per instruction set, Triton, CUDA."""
    gpu = torch.cuda.is_available()
    wanted = [Backend("reference")] if reference else []
    wanted += [Backend("cpu", "cpu", isa) for isa in isas]
    wanted += [Backend("triton", "cuda" if gpu else "cpu")]
    wanted += [Backend("cuda", "cuda" if gpu else "cpu")]
    params = []
    for backend in wanted:
        reason = _runnable(backend, op)
        if reason.endswith(f"has no {backend.plain} kernel"):
            continue  # an operation has the stations that it needs, no more
        marks = [pytest.mark.skip(reason=reason)] if reason else []
        if backend.device == "cuda":
            marks.append(pytest.mark.gpu)
        params.append(pytest.param(backend, id=backend.label, marks=marks))
    return params
