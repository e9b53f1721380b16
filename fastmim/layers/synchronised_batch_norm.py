"""Batch norm over the rows of all processes.

Legend: M rows of this process, C channels.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastmim.ops.rows_batch_norm import choose_backend, update_running
from fastmim.ops.rows_norm_steps import RowsNorm, gradient_sums, input_gradient, moments, normalise, wide

__all__ = ["synchronised_batch_norm"]


def synchronised_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | Tensor,
    eps: float,
    group: Any,
    *,
    residual: Tensor | None = None,
    factor: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`rows_batch_norm` in training over the rows of all processes of `group`: one all-reduce forward, one backward."""
    norm = RowsNorm(weight, bias, factor, eps, relu, choose_backend(x))
    shift = x.new_zeros(x.shape[-1], dtype=wide(x.dtype)) if running_mean is None else running_mean.clone()
    out, mean, variance, count = _SynchronisedBatchNorm.apply(x, residual, weight, bias, shift, norm, group)
    if running_mean is not None:
        update_running(running_mean, running_var, mean, variance * (count / (count - 1)), momentum)
    return out


class _SynchronisedBatchNorm(torch.autograd.Function):
    """The number of rows, the sum of mean - shift and that of squares travel, so that one all-reduce gives mean and
    variance.

    The shift is the running mean, which all processes share: without it the square of a large mean would drown the
    variance in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        shift: Tensor,
        norm: RowsNorm,
        group: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, channels = x.contiguous(), x.shape[-1]
        residual = None if residual is None else residual.contiguous()
        mean, variance = moments(x, norm)
        count = mean.new_full((1,), x.numel() // channels)
        offset = mean - shift.to(mean.dtype)
        sums = torch.cat([offset * count, (variance + offset.square()) * count, count])
        dist.all_reduce(sums, group=group)
        count = sums[-1]
        offset = sums[:channels] / count
        variance = (sums[channels:-1] / count - offset.square()).clamp_min(0)
        mean = shift.to(mean.dtype) + offset
        out = normalise(x, residual, norm, mean, variance)
        kept = out if norm.relu and residual is not None else None
        ctx.save_for_backward(x, kept, weight, bias, norm.factor, mean, variance, count)
        ctx.norm, ctx.group, ctx.has_residual = norm, group, residual is not None
        ctx.mark_non_differentiable(mean, variance, count)
        return out, mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, out, weight, bias, factor, mean, variance, count = ctx.saved_tensors
        norm = ctx.norm._replace(weight=weight, bias=bias, factor=factor)
        gradient = gradient.contiguous()
        local, masked = gradient_sums(gradient, x, out, norm, mean, variance)
        total = local.clone()  # the parameters' gradients stay local: the trainer averages them like all others
        dist.all_reduce(total, group=ctx.group)
        x_gradient = input_gradient(gradient, x, masked, norm, mean, variance, total / count)
        residual = None if not ctx.has_residual else gradient if masked is None else masked
        weight_gradient = None if weight is None else local[1].to(weight.dtype)
        bias_gradient = None if bias is None else local[0].to(bias.dtype)
        return x_gradient, residual, weight_gradient, bias_gradient, None, None, None
