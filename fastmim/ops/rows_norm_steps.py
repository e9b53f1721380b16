"""The four passes of batch norm over rows, as the operation and its form over several processes put them together.

Legend: B images, M rows of all of them, C channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastmim.ops.backends import compiled

__all__ = ["ELEMENTS", "RowsNorm", "gradient_sums", "input_gradient", "moments", "normalise", "wide"]

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/cpu/element.h numbers them


class RowsNorm(NamedTuple):
    """relu(((x - mean) / sqrt(variance + eps) * weight + bias) * factor + residual), or less of it."""

    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    factor: Tensor | None  # [B], a constant
    eps: float
    relu: bool
    backend: str

    def run(self, kernel: str, x: Tensor, mean: Tensor, variance: Tensor, *others: Tensor | None) -> None:
        """Calls a compiled pass; the others are what it takes beyond those that all of them take."""
        channels = [_floats(part) for part in (self.weight, self.bias, self.factor, mean, variance)]
        rows = x.numel() // x.shape[-1]
        shape = rows, x.shape[-1], rows // x.shape[0]
        pointers, further = ([0 if t is None else t.data_ptr() for t in group] for group in (channels, others))
        getattr(compiled(), kernel)(shape, ELEMENTS[x.dtype], self.eps, self.relu, pointers, x.data_ptr(), *further)

    def per_row(self, x: Tensor) -> Tensor | float:
        """The factor in a shape that multiplies x; 1 where there is none."""
        return 1.0 if self.factor is None else self.factor.to(wide(x.dtype)).reshape(-1, *(1,) * (x.dim() - 1))


def wide(dtype: torch.dtype) -> torch.dtype:
    """What statistics and sums are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def moments(x: Tensor, norm: RowsNorm) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, [C] each."""
    if norm.backend != "cpu":
        variance, mean = torch.var_mean(x.reshape(-1, x.shape[-1]).to(wide(x.dtype)), 0, correction=0)
        return mean, variance
    mean, variance = (x.new_empty(x.shape[-1], dtype=torch.float32) for _ in range(2))
    norm.run("rows_moments", x, mean, variance)
    return mean, variance


def normalise(x: Tensor, residual: Tensor | None, norm: RowsNorm, mean: Tensor, variance: Tensor) -> Tensor:
    """The result, in the dtype of x."""
    if norm.backend != "cpu":
        out = (x.to(mean.dtype) - mean) * torch.rsqrt(variance + norm.eps)
        out = out if norm.weight is None else out * norm.weight.to(out.dtype)
        out = (out if norm.bias is None else out + norm.bias.to(out.dtype)) * norm.per_row(x)
        out = out if residual is None else out + residual
        return (out.relu() if norm.relu else out).to(x.dtype)
    out = torch.empty_like(x)
    norm.run("rows_batch_norm", x, mean, variance, residual, out)
    return out


def gradient_sums(
    gradient: Tensor, x: Tensor, out: Tensor | None, norm: RowsNorm, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Sums over rows [2, C]: of the gradient of what the norm gives, and of that times the normalised x. And, with
    `out`, the gradient of a residual: where the relu let it through. Without `out` the norm is all that the relu saw.
    """
    if norm.backend != "cpu":
        normal = (x.to(mean.dtype) - mean) * torch.rsqrt(variance + norm.eps)
        masked = _let_through(gradient, x, out, norm, mean, variance)
        rows = (masked.to(mean.dtype) * norm.per_row(x)).reshape(-1, x.shape[-1])
        sums = torch.stack([rows.sum(0), (rows * normal.reshape(rows.shape)).sum(0)])
        return sums, None if out is None else masked
    sums = x.new_empty((2, x.shape[-1]), dtype=torch.float32)
    let_through = None if out is None else torch.empty_like(x)
    norm.run("rows_gradient_sums", x, mean, variance, gradient, out, let_through, sums)
    return sums, let_through


def input_gradient(
    gradient: Tensor,
    x: Tensor,
    masked: Tensor | None,
    norm: RowsNorm,
    mean: Tensor,
    variance: Tensor,
    means: Tensor | None,
) -> Tensor:
    """The gradient of x. `masked` is what `gradient_sums` made; `means` its sums over the number of rows, or None where
    mean and variance are constants."""
    if norm.backend != "cpu":
        scale = torch.rsqrt(variance + norm.eps)
        masked = _let_through(gradient, x, None, norm, mean, variance) if masked is None else masked
        inner = masked.to(mean.dtype) * norm.per_row(x)
        if means is not None:
            inner = inner - means[0] - (x.to(mean.dtype) - mean) * scale * means[1]
        return (inner * (scale if norm.weight is None else scale * norm.weight.to(scale.dtype))).to(x.dtype)
    x_gradient = torch.empty_like(x)
    norm.run("rows_input_gradient", x, mean, variance, gradient, masked, means, x_gradient)
    return x_gradient


def _let_through(
    gradient: Tensor, x: Tensor, out: Tensor | None, norm: RowsNorm, mean: Tensor, variance: Tensor
) -> Tensor:
    if not norm.relu:
        return gradient
    out = normalise(x, None, norm, mean, variance) if out is None else out
    return torch.where(out <= 0, 0, gradient)


def _floats(part: Tensor | None) -> Tensor | None:
    if part is None or (part.dtype == torch.float32 and part.is_contiguous()):
        return part
    return part.to(torch.float32).contiguous()
