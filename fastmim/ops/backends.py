"""Chooses, for every operation, which implementation runs: the one place that knows about backends.

An operation names its stations once:

    _backends = Backends("random_mask", cpu="random_mask", triton="fastmim.kernels.random_mask")

and asks `choose(device, dtype, backend)`. Chosen automatically, an unavailable backend is passed over quietly; asked
for by name (`backend=` or FASTMIM_BACKEND=), it fails loudly with its reason.
"""

import importlib
import os
from collections.abc import Iterable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastmim.ops.extension import load_extension

NAMES = ("reference", "cpu", "triton", "cuda")
_AUTOMATIC = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_REGISTRY: dict[str, "Backends"] = {}


class Backends:
    """The stations of one operation.

    Args:
        op: the public name.
        cpu: name of a function of fastmim._C that must exist, or None.
        triton: module with the Triton launchers, or None.
        cuda: name of a function of fastmim._C that must exist, or None.
        dtypes: what each compiled backend accepts; a backend that is not listed accepts everything.
    """

    def __init__(
        self,
        op: str,
        *,
        cpu: str | None = None,
        triton: str | None = None,
        cuda: str | None = None,
        dtypes: dict[str, Iterable[torch.dtype]] | None = None,
    ) -> None:
        self.op = op
        self._stations = {"cpu": cpu, "triton": triton, "cuda": cuda}
        self._dtypes = {name: frozenset(accepted) for name, accepted in (dtypes or {}).items()}
        _REGISTRY[op] = self

    def choose(
        self, device: torch.device, dtype: torch.dtype | None = None, backend: str | None = None, unfit: str = ""
    ) -> str:
        """The backend that will run. Traceable by torch.compile (the answer is a constant of the graph).

        Args:
            unfit: why no kernel takes arguments like these (a size, say); empty when they do.

        Raises:
            ValueError: a backend asked for by name that cannot run here, with the reason.
        """
        return _choose(self.op, device.type, dtype, backend, unfit)

    def why_not(self, name: str, device_type: str, dtype: torch.dtype | None = None) -> str:
        """Empty when backend `name` can run on such tensors, else the reason."""
        if name == "reference":
            return ""
        station = self._stations[name]
        if station is None:
            return f"{self.op} has no {name} kernel"
        accepted = self._dtypes.get(name)
        if dtype is not None and accepted is not None and dtype not in accepted:
            return f"the {name} kernel does not take {dtype}"
        if name == "triton":
            return _why_no_triton(device_type)
        wanted = "cpu" if name == "cpu" else "cuda"
        if device_type != wanted:
            return f"the {name} kernel needs tensors on {wanted}, these are on {device_type}"
        extension, reason = load_extension()
        if extension is None:
            return reason
        if not hasattr(extension, station):
            why = "it is older than the sources, build it again" if name == "cpu" else extension.build_info()["cuda"]
            return f"this build of fastmim._C has no {station}: {why}"
        return ""

    def triton(self) -> ModuleType:
        """The module with this operation's Triton launchers."""
        station = self._stations["triton"]
        assert station is not None
        return importlib.import_module(station)


def compiled() -> Any:
    """fastmim._C, once `choose` has answered "cpu" or "cuda"."""
    extension, reason = load_extension()
    assert extension is not None, reason
    return extension


def is_observed(x: Tensor) -> bool:
    """Is anybody watching for operators: a compiler, a dispatch mode, a functional transform, a kind of tensor?"""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def operations() -> dict[str, Backends]:
    """Every operation that has been imported, by name."""
    return dict(sorted(_REGISTRY.items()))


def _choose(op: str, device_type: str, dtype: torch.dtype | None, backend: str | None, unfit: str) -> str:
    backends = _REGISTRY[op]
    source = "backend="
    if backend is None:
        backend, source = os.environ.get("FASTMIM_BACKEND") or None, "FASTMIM_BACKEND="
    if backend is None:
        for name in _AUTOMATIC.get(device_type, ("reference",)) if not unfit else ("reference",):
            if not backends.why_not(name, device_type, dtype):
                return name
    if backend not in NAMES:
        raise ValueError(f"{op}: unknown backend {source}{backend!r}; expected one of {', '.join(NAMES)}")
    reason = backends.why_not(backend, device_type, dtype) or (unfit if backend != "reference" else "")
    if reason:
        raise ValueError(f"{op}: {source}{backend!r} cannot run: {reason}")
    return backend


# What torch.compiler.assume_constant_result sets; calling it imports all of torch._dynamo, a second that --help feels.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _triton_import_error() -> str:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton does not import: {error}"
    return ""


def _why_no_triton(device_type: str) -> str:
    if error := _triton_import_error():
        return error
    if device_type == "cuda":
        return ""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return f"Triton kernels need tensors on cuda, these are on {device_type} (TRITON_INTERPRET=1 interprets, for tests)"


def check_divisible(op: str, height: int, width: int, patch: tuple[int, int]) -> None:
    """Raises ValueError unless patches of `patch` = (ph, pw) pixels tile an image of height x width."""
    if patch[0] < 1 or patch[1] < 1:
        raise ValueError(f"{op}: patch_size is {patch[0]}x{patch[1]}; both sides must be at least 1")
    if height % patch[0] or width % patch[1]:
        raise ValueError(
            f"{op}: an image of {height}x{width} pixels does not divide into patches of {patch[0]}x{patch[1]}"
        )


def check_mask(op: str, mask: Tensor, batch: int, cells: int) -> None:
    """Raises ValueError unless mask is bool [batch, cells]."""
    if mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask must be bool (True = removed), got {mask.dtype}")
    if mask.shape != (batch, cells):
        raise ValueError(f"{op}: mask is {list(mask.shape)}, expected [{batch}, {cells}] (batch, patches)")
