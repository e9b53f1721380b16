"""Batch norm over the visible positions of a batch, of one process or of all.

Legend: B batch, K visible cells, t tile side, C channels, M = B * K * t * t visible positions.
"""

from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.layers.synchronised_batch_norm import synchronised_batch_norm
from fastmim.ops import TileIndex, rows_batch_norm

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

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        tiles: TileIndex,
        residual: Tensor | None = None,
        factor: Tensor | None = None,
        relu: bool = False,
    ) -> Tensor:
        """[B, K, t, t, C] -> [B, K, t, t, C]; with what may follow a norm, in the same passes over memory.

        Args:
            x: tiles.
            tiles: the visible cells.
            residual: tiles that are added to the normalised ones; or None.
            factor: [B], what the normalised rows of each image are multiplied by before that; or None.
            relu: take the larger of the result and zero.
        """
        # `self` may also be a plain nn.BatchNorm2d or nn.SyncBatchNorm that `sparsify` runs by this function.
        if x.numel() == 0:
            out = x if residual is None else x + residual
            return F.relu(out) if relu else out
        if residual is not None and residual.dtype != x.dtype:
            out = MaskedBatchNorm2d.forward(self, x, tiles, factor=factor) + residual
            return F.relu(out) if relu else out
        of_batch = self.training or self.running_mean is None or self.running_var is None
        tracked = (self.running_mean, self.running_var) if not of_batch or self.track_running_stats else (None, None)
        momentum: Any = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            # momentum None is torch's cumulative average
            momentum = 1.0 / self.num_batches_tracked if self.momentum is None else momentum
        after: dict[str, Any] = {"residual": residual, "factor": factor, "relu": relu}
        if of_batch and self.training and (isinstance(self, nn.SyncBatchNorm) or getattr(self, "sync", False)):
            group = getattr(self, "process_group", None)
            if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
                return synchronised_batch_norm(x, *tracked, self.weight, self.bias, momentum, self.eps, group, **after)
        return rows_batch_norm(x, *tracked, self.weight, self.bias, of_batch, momentum, self.eps, **after)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", sync=True" if self.sync else "")
