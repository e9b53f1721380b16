"""How a kernel file says which configurations it ships, so that they can be compiled without a GPU."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Config:
    """One kernel with one choice of types and constants.

    Args:
        kernel: the @triton.jit function.
        signature: argument name -> Triton type ("*i64", "i32", "fp32"); constants are left out.
        constants: constexpr name -> value.
        num_warps, num_stages: as launched.
        aligned: arguments that are multiples of 16 when launched (pointers, and lengths used in masks).
        max_registers: a thread may have, as launched (maxnreg).
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    aligned: tuple[str, ...] = field(default=())
    max_registers: int | None = None

    def __str__(self) -> str:
        constants = ",".join(f"{name}={value}" for name, value in self.constants.items())
        types = ",".join(dict.fromkeys(self.signature.values()))
        return f"{self.kernel.__name__}[{constants};{types};warps={self.num_warps}]"
