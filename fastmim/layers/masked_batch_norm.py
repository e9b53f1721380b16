"""Batch norm over the visible positions of a batch, of one process or of all.

Legend: B batch, K visible cells, t tile side, C channels, M = B * K * t * t visible positions.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmim.layers.rows import as_map, as_tiles
from fastmim.ops import TileIndex

__all__ = ["MaskedBatchNorm2d"]


class MaskedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` on tiles: mean and variance of the M visible positions; running statistics likewise, with the
    unbiased variance.

    Args:
        num_features, eps, momentum, affine, track_running_stats: those of `nn.BatchNorm2d`.
        sync: in training, take the statistics over all processes, as `nn.SyncBatchNorm` does; one all-reduce of sums
            forward and one backward, on any device. Without an initialised process group it changes nothing.
        process_group: the processes of `sync`; all when None.
    """

    sync = False
    process_group: Any = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        sync: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.sync = sync
        self.process_group = process_group

    def forward(self, x: Tensor, tiles: TileIndex) -> Tensor:  # type: ignore[override]
        """[B, K, t, t, C] -> [B, K, t, t, C]."""
        # `self` may also be a plain nn.BatchNorm2d or nn.SyncBatchNorm that `sparsify` runs by this function.
        if x.numel() == 0:
            return x
        if self.training and (isinstance(self, nn.SyncBatchNorm) or getattr(self, "sync", False)):
            group = getattr(self, "process_group", None)
            if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
                return _synchronised(self, x, group)
        return as_tiles(nn.BatchNorm2d.forward(self, as_map(x)), like=x)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", sync=True" if self.sync else "")


def _synchronised(norm: Any, x: Tensor, group: Any) -> Tensor:
    """Batch norm in training, over all processes of `group`; updates the running statistics of `norm`."""
    tracked = norm.running_mean is not None
    shift = norm.running_mean if tracked else x.new_zeros(x.shape[-1], dtype=_wide(x.dtype))
    rows = x.reshape(-1, x.shape[-1])
    out, mean, variance, count = _SynchronisedBatchNorm.apply(
        rows, norm.weight, norm.bias, shift.clone(), norm.eps, group
    )
    if tracked:
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            # momentum None is torch's cumulative average
            momentum = 1.0 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
            unbiased = variance * (count / (count - 1))
            norm.running_mean.add_((mean - norm.running_mean) * momentum)
            norm.running_var.add_((unbiased - norm.running_var) * momentum)
    return out.reshape(x.shape)  # out here: what a Function returns must be no view for an activation in place


class _SynchronisedBatchNorm(torch.autograd.Function):
    """Sums of x - shift and of its square travel, so that one all-reduce gives mean and variance.

    The shift is the running mean, which all processes share: without it the square of a large mean would drown the
    variance in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[-1]
        centred = x.reshape(-1, channels).to(_wide(x.dtype)) - shift
        count = centred.new_full((1,), centred.shape[0])
        sums = torch.cat([centred.sum(0), centred.square().sum(0), count])
        dist.all_reduce(sums, group=group)
        count = sums[-1]
        offset = sums[:channels] / count
        variance = (sums[channels:-1] / count - offset.square()).clamp_min(0)
        scale = torch.rsqrt(variance + eps)
        normal = (centred - offset) * scale
        out = normal if weight is None else normal * weight
        out = out if bias is None else out + bias
        mean = shift + offset
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.group = group
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(mean, variance, count)
        return out.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, scale, count = ctx.saved_tensors
        channels = x.shape[-1]
        gradient = gradient.reshape(-1, channels).to(mean.dtype)
        normal = (x.reshape(-1, channels) - mean) * scale
        local = torch.cat([gradient.sum(0), (gradient * normal).sum(0)])
        total = local.clone()  # the parameters' gradients stay local: the trainer averages them like all others
        dist.all_reduce(total, group=ctx.group)
        steady, along = (total / count).split(channels)
        factor = scale if weight is None else scale * weight
        x_gradient = ((gradient - steady - normal * along) * factor).to(x.dtype).reshape(x.shape)
        weight_gradient = None if weight is None else local[channels:].to(weight.dtype)
        bias_gradient = local[:channels].to(mean.dtype) if ctx.has_bias else None
        return x_gradient, weight_gradient, bias_gradient, None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What statistics are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
