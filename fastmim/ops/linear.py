"""Matrix product of a linear layer, by the faster of the two libraries that torch carries on a CPU.

torch multiplies fp32 matrices with MKL, which on processors of other makers than its own stops at AVX2. oneDNN, also
part of torch, uses AVX-512 on all of them: about twice the speed for the same fp32 result up to rounding. It is used
where that is known to hold; everywhere else, in other precisions and under autocast this is torch's own `linear`.

Legend: M rows, K input features, N output features.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["linear", "why_not_onednn"]

_SMALLEST = 1 << 23  # multiplications; below, what oneDNN needs to set out costs more than it saves


@cache
def why_not_onednn() -> str:
    """Empty where fp32 products on this CPU go to oneDNN, else the reason."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return "this torch is built without oneDNN"
    if not torch.backends.mkl.is_available():
        return "this torch multiplies without MKL"
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return "torch does not use AVX-512 on this CPU"
    if _vendor() == "GenuineIntel":
        return "MKL uses AVX-512 on this CPU"
    return ""


def _vendor() -> str:
    """The maker of the first processor as Linux names it; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "GenuineIntel"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "GenuineIntel")


torch.library.define("fastmim::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl("fastmim::linear", "cpu")
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.register_fake("fastmim::linear")
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Through the same operator, so that it has derivatives of every order."""
    x, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad
    of_weight = None
    if needs_weight and x.numel() + weight.numel() < grad.numel():
        # oneDNN transposes its first argument in memory, so the smaller matrix goes there; then the result is to be.
        of_weight = torch.ops.fastmim.linear(x.t(), grad.t(), None).t()
    elif needs_weight:
        of_weight = torch.ops.fastmim.linear(grad.t(), x.t(), None)
    return (
        torch.ops.fastmim.linear(grad, weight.t(), None) if needs_x else None,
        of_weight,
        grad.sum(0) if needs_bias else None,
    )


torch.library.register_autograd("fastmim::linear", _differentiate, setup_context=_save)


def _chosen() -> bool:
    return os.environ.get("FASTMIM_BACKEND") != "reference" and not why_not_onednn()


# As in backends.py: for torch.compile the answer is a constant of the graph.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, as `torch.nn.functional.linear`.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.

    Returns:
        [..., N].

    oneDNN multiplies fp32 matrices on the CPU where `why_not_onednn()` is empty and FASTMIM_BACKEND is not
    "reference"; a product of the same shapes is then the same bit for bit, as it is with MKL.
    """
    if (
        x.device.type != "cpu"
        or not (x.dtype == weight.dtype == torch.float32)
        or torch.is_autocast_enabled("cpu")
        or x.numel() * weight.shape[0] < _SMALLEST
        or not _chosen()
    ):
        return F.linear(x, weight, bias)
    rows = torch.ops.fastmim.linear(x.reshape(-1, x.shape[-1]), weight, bias)
    return rows.view(*x.shape[:-1], weight.shape[0])
