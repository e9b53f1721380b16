"""Batch norm over rows with what follows it in a residual network, in two passes over memory each way.

Legend: B images, M rows of all of them, C channels.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmim.ops.backends import Backends, is_observed
from fastmim.ops.rows_norm_steps import ELEMENTS, RowsNorm, gradient_sums, input_gradient, moments, normalise

__all__ = ["choose_backend", "rows_batch_norm", "rows_batch_norm_ref", "update_running"]

_backends = Backends("rows_batch_norm", cpu="rows_batch_norm", dtypes={"cpu": ELEMENTS})


def rows_batch_norm_ref(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    factor: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """What the operation means, in plain PyTorch. Any device, any dtype, differentiable."""
    rows = x.reshape(1, -1, 1, x.shape[-1]).movedim(-1, 1)  # [1, C, M, 1], channels last
    out = F.batch_norm(rows, running_mean, running_var, weight, bias, training, float(momentum), eps)
    out = out.movedim(1, -1).reshape(x.shape)
    if factor is not None:
        out = out * factor.to(out.dtype).reshape(-1, *(1,) * (x.dim() - 1))
    out = out if residual is None else out + residual
    return F.relu(out) if relu else out


def rows_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    factor: Tensor | None = None,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`F.batch_norm` over all dimensions but the last, then times a factor, plus a residual, through a ReLU.

    For the backward pass it keeps x, and its result only where there are both a residual and a ReLU.

    Args:
        x: [B, ..., C], floating point, at least one row; in training more than one.
        running_mean, running_var, weight, bias: [C] or None, as F.batch_norm has them. In training the first two are
            updated, with the unbiased variance.
        training: take mean and variance from x, not from running_mean and running_var.
        momentum: share of x in the update; a number or a tensor of one element.
        eps: added to the variance.
        residual: [B, ..., C] in the dtype of x, added before the ReLU; or None.
        factor: [B], multiplies each image's normalised rows, as stochastic depth does; a constant, or None.
        relu: take the larger of the result and zero.
        backend: "reference" or "cpu"; chosen by device when None.

    Returns:
        [B, ..., C] in the dtype of x; statistics and sums in fp32 (fp64 in fp64, which the reference computes).
        Differentiable once with respect to x, residual, weight and bias; the gradients are deterministic.

    Raises:
        ValueError: shapes that do not fit, naming both; or a backend asked for by name that cannot run, with its
            reason.
    """
    _check(x, running_mean, running_var, weight, bias, training, residual, factor)
    chosen = choose_backend(x, backend)
    if chosen == "reference":
        return rows_batch_norm_ref(
            x, running_mean, running_var, weight, bias, training, momentum, eps,
            residual=residual, factor=factor, relu=relu,
        )  # fmt: skip
    fixed = (None, None) if training else (running_mean, running_var)
    run = torch.ops.fastmim.rows_batch_norm if is_observed(x) else _Direct.apply
    out, mean, variance = run(x, residual, weight, bias, factor, *fixed, eps, relu, chosen)
    if training and running_mean is not None:
        count = x.numel() // x.shape[-1]
        update_running(running_mean, running_var, mean, variance * (count / (count - 1)), momentum)
    return out


def choose_backend(x: Tensor, backend: str | None = None) -> str:
    """The one that will run."""
    if backend is None and os.environ.get("FASTMIM_BACKEND") in ("triton", "cuda"):
        return "reference"  # meant for the operations that have such a kernel; torch's own does this one there
    return _backends.choose(x.device, x.dtype, backend)


@torch.no_grad()
def update_running(
    running_mean: Tensor, running_var: Tensor | None, mean: Tensor, unbiased: Tensor, momentum: float | Tensor
) -> None:
    """The running statistics of a batch norm, moved towards those of a batch."""
    assert running_var is not None
    for running, new in ((running_mean, mean), (running_var, unbiased)):
        share = momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum
        running.lerp_(new.detach().to(running.dtype), share)


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    residual: Tensor | None,
    factor: Tensor | None,
) -> None:
    """Raises ValueError in the caller's terms."""
    op = "rows_batch_norm"
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"{op}: x must be [B, ..., C] and floating point, got {x.dtype} {list(x.shape)}")
    channels = x.shape[-1]
    rows = x.numel() // channels if channels else 0
    if rows == 0 or (training and rows == 1):
        raise ValueError(
            f"{op}: {'more than one row is' if training else 'rows are'} needed, x is {list(x.shape)}, training is "
            f"{training}"
        )
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, part in named.items():
        if part is not None and part.shape != (channels,):
            raise ValueError(f"{op}: {name} is {list(part.shape)}, x has {channels} channels")
    if (running_mean is None) != (running_var is None) or (not training and running_mean is None):
        raise ValueError(f"{op}: running_mean and running_var go together, and are needed unless training is True")
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(f"{op}: residual is {residual.dtype} {list(residual.shape)}, x is {x.dtype} {list(x.shape)}")
    if factor is not None and factor.shape != x.shape[:1]:
        raise ValueError(f"{op}: factor is {list(factor.shape)}, x has {x.shape[0]} images")
    for part in (*named.values(), residual, factor):
        if part is not None and part.device != x.device:
            raise ValueError(f"{op}: everything must be on one device, got {x.device} and {part.device}")


_channels = "Tensor? weight, Tensor? bias, Tensor? factor"
torch.library.define(
    "fastmim::rows_batch_norm",
    f"(Tensor x, Tensor? residual, {_channels}, Tensor? mean, Tensor? variance, float eps, bool relu, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
# Gradients of x and of the residual (empty without `out`); sums [2, C] of `gradient_sums`.
torch.library.define(
    "fastmim::rows_batch_norm_backward",
    f"(Tensor gradient, Tensor x, Tensor? out, {_channels}, Tensor mean, Tensor variance, float eps, bool relu,"
    " bool fixed, str backend) -> (Tensor, Tensor, Tensor)",
)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    relu: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    x, norm = x.contiguous(), RowsNorm(weight, bias, factor, eps, relu, backend)
    residual = None if residual is None else residual.contiguous()
    if mean is None or variance is None:
        mean, variance = moments(x, norm)
    else:
        mean, variance = mean.to(torch.float32, copy=True), variance.to(torch.float32, copy=True)
    return normalise(x, residual, norm, mean, variance), mean, variance


def _backward(
    gradient: Tensor,
    x: Tensor,
    out: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    relu: bool,
    fixed: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient, x, norm = gradient.contiguous(), x.contiguous(), RowsNorm(weight, bias, factor, eps, relu, backend)
    out = None if out is None else out.contiguous()
    sums, masked = gradient_sums(gradient, x, out, norm, mean, variance)
    means = None if fixed else sums * (x.shape[-1] / x.numel())
    x_gradient = input_gradient(gradient, x, masked, norm, mean, variance, means)
    return x_gradient, x.new_empty((0,)) if masked is None else masked, sums


torch.library.impl("fastmim::rows_batch_norm", ("cpu", "cuda"))(_forward)
torch.library.impl("fastmim::rows_batch_norm_backward", ("cpu", "cuda"))(_backward)


@torch.library.register_fake("fastmim::rows_batch_norm")
def _fake_forward(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance = (x.new_empty((x.shape[-1],), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, variance


@torch.library.register_fake("fastmim::rows_batch_norm_backward")
def _fake_backward(gradient: Tensor, x: Tensor, out: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    masked = x.new_empty((0,) if out is None else x.shape)
    return x.new_empty(x.shape), masked, x.new_empty((2, x.shape[-1]), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, factor, mean, _, ctx.eps, ctx.relu, ctx.backend = inputs
    ctx.fixed, ctx.has_residual = mean is not None, residual is not None
    ctx.mark_non_differentiable(*output[1:])
    out = output[0] if ctx.relu and ctx.has_residual else None
    ctx.save_for_backward(x, out, weight, bias, factor, *output[1:])


def _differentiate(ctx: Any, gradient: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, gradient, torch.ops.fastmim.rows_batch_norm_backward)


def _gradients(ctx: Any, gradient: Tensor, backward: Callable[..., Any]) -> tuple[Tensor | None, ...]:
    """Of every argument of the operator."""
    x, out, weight, bias, factor, mean, variance = ctx.saved_tensors
    x_gradient, masked, sums = backward(
        gradient, x, out, weight, bias, factor, mean, variance, ctx.eps, ctx.relu, ctx.fixed, ctx.backend
    )
    residual = None if not ctx.has_residual else gradient if out is None else masked
    bias_gradient, weight_gradient = (
        None if part is None else sums[i].to(part.dtype) for i, part in enumerate((bias, weight))
    )
    return x_gradient, residual, weight_gradient, bias_gradient, *(None,) * 6


torch.library.register_autograd("fastmim::rows_batch_norm", _differentiate, setup_context=_save)


class _Direct(torch.autograd.Function):
    """The operator and its gradient without the dispatcher, whose rounds take as long as the kernels of small maps."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, gradient, _backward)
