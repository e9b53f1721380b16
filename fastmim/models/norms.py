"""Normalisations that convolutional encoders share.

Legend: B batch, C channels, H W height and width of a feature map.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fastmim.layers import MaskedBatchNorm2d

__all__ = ["BatchNorm2d", "GlobalResponseNorm", "LayerNorm2d", "synchronise_batch_norms"]


class BatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that takes its statistics over all processes in training, on any device, once `sync` is set.

    What `nn.SyncBatchNorm` does on GPUs alone. With a single process it is the plain one, to the bit.
    """

    sync = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        wanted = self.sync and self.training
        if not (wanted and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        rows = x.permute(0, 2, 3, 1)
        tiles = rows.reshape(x.shape[0], -1, 1, 1, x.shape[1])  # a map whose positions are all visible
        return MaskedBatchNorm2d.forward(self, tiles, None).reshape(rows.shape).permute(0, 3, 1, 2)  # type: ignore[arg-type]


def synchronise_batch_norms(module: nn.Module) -> None:
    """From now on the batch norms in `module` take their statistics over all processes of a run, on maps and on tiles.

    Without an initialised process group of several nothing changes.
    """
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.sync = True  # type: ignore[assignment]  # read by BatchNorm2d above, and by MaskedBatchNorm2d


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of a map [B, C, H, W]; the same state-dict keys as `nn.LayerNorm`.

    The result lies channels-last in memory, so one of these in the stem keeps the rest of a network channels-last.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    """Competition between channels, on a channels-last map [B, H, W, C].

    With g_c the L2 norm of channel c over the map and n_c = g_c / (mean over channels of g + eps):
    x + weight * x * n + bias. Weight and bias start at zero, i.e. the layer starts as the identity.

    Source: ConvNeXt V2 (arXiv 2301.00808, section 3.2).
    """

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)  # [B, 1, 1, C]
        relative = response / (response.mean(dim=-1, keepdim=True) + self.eps)
        return x + torch.addcmul(self.bias, self.weight, x * relative)
