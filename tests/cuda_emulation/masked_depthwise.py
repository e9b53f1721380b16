"""The CUDA kernels of the depthwise convolution under the names that fastmim._C gives them, run on the host."""

import ctypes
from collections.abc import Callable
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import pytest

import fastmim.ops.masked_conv
from fastmim.ops.backends import Backends
from tests.cuda_emulation.host_build import load


class MaskedDepthwise(ctypes.Structure):
    """As csrc/cuda/masked_depthwise.h has it."""

    _fields_ = (
        [(name, c_int64) for name in ("batch", "count", "side", "channels", "kernel", "stride")]
        + [("neighbours", c_void_p), ("element", c_int), ("weight_element", c_int)]
        + [(name, c_void_p) for name in ("x", "weight", "bias", "out", "x_gradient", "weight_gradient")]
        + [(name, c_void_p) for name in ("bias_gradient", "room", "stream")]
    )


_NAMES = ("batch", "count", "side", "channels", "kernel", "stride")


class Emulated:
    """Stands in for fastmim._C where its CUDA functions are asked for."""

    def __init__(self) -> None:
        self.library = load("masked_depthwise.cpp")
        self.library.depthwise_room.restype = c_int64
        for name in ("masked_depthwise", "masked_depthwise_input_gradient", "masked_depthwise_weight_gradient"):
            getattr(self.library, name).restype = ctypes.c_char_p

    def set_reversed(self, value: bool) -> None:
        """Blocks and threads run backwards."""
        self.library.set_reversed(int(value))

    def _run(self, function: str, shape: tuple[int, ...], **members: Any) -> None:
        p = MaskedDepthwise(**dict(zip(_NAMES, shape, strict=True)), **members)
        wrong = getattr(self.library, function)(ctypes.byref(p))
        if wrong:
            raise RuntimeError(f"{function} on CUDA: {wrong.decode()}")

    def masked_depthwise_cuda_room(self, shape: tuple[int, ...], weight_gradient: bool) -> int:
        p = MaskedDepthwise(**dict(zip(_NAMES, shape, strict=True)))
        return self.library.depthwise_room(ctypes.byref(p), int(weight_gradient))

    def masked_depthwise_cuda(self, shape, neighbours, element, weight_element, x, weight, bias, out, room, stream):
        common = {"neighbours": neighbours, "element": element, "weight_element": weight_element, "room": room}
        self._run("masked_depthwise", shape, **common, x=x, weight=weight, bias=bias, out=out)

    def masked_depthwise_input_gradient_cuda(
        self, shape, neighbours, element, weight_element, gradient, weight, x_gradient, room, stream
    ):
        common = {"neighbours": neighbours, "element": element, "weight_element": weight_element, "room": room}
        self._run(
            "masked_depthwise_input_gradient", shape, **common, out=gradient, weight=weight, x_gradient=x_gradient
        )

    def masked_depthwise_weight_gradient_cuda(
        self, shape, neighbours, element, weight_element, gradient, x, weight_gradient, bias_gradient, room, stream
    ):
        common = {"neighbours": neighbours, "element": element, "weight_element": weight_element, "room": room}
        self._run(
            "masked_depthwise_weight_gradient", shape, **common, out=gradient, x=x,
            weight_gradient=weight_gradient, bias_gradient=bias_gradient,
        )  # fmt: skip


def emulate(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """From here on, backend "cuda" of the depthwise convolution takes CPU tensors."""
    emulated, compiled, why_not = Emulated(), fastmim.ops.masked_conv.compiled, Backends.why_not

    class Extension:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            return getattr(emulated if "_cuda" in name else compiled(), name)

    def can(self: Backends, name: str, device_type: str, *rest: Any) -> str:
        return why_not(self, name, device_type, *rest) if name != "cuda" else ""

    monkeypatch.setattr(fastmim.ops.masked_conv, "compiled", Extension)
    monkeypatch.setattr(Backends, "why_not", can)
    return emulated
