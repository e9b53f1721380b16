"""Global response normalisation over the visible positions.

Legend: B batch, K visible cells, t tile side, C channels.
"""

import torch
from torch import Tensor, nn

from fastmim.ops import TileIndex

__all__ = ["GRN_STATS", "MaskedGRN", "grn_on_tiles"]

GRN_STATS = ("image", "batch")


class MaskedGRN(nn.Module):
    """Competition between channels on tiles; constructor and keys of timm's GlobalResponseNorm.

    With g_c the L2 norm of channel c over the visible positions and n_c = g_c / (mean over channels of g + eps):
    x + weight * x * n + bias. Weight and bias start at zero, i.e. the layer starts as the identity.

    Args:
        dim: C.
        eps: added to the mean over channels.
        channels_last: accepted for the sake of timm's signature; tiles always have their channels last.
        grn_stats: "image" takes the norm over each image, as the dense layer does; "batch" over the whole batch, as
            the authors' code for pre-training does.

    Source: ConvNeXt V2 (arXiv 2301.00808, section 3.2); the mean instead of the paper's sum is the authors' code.
    """

    def __init__(self, dim: int, eps: float = 1e-6, channels_last: bool = True, *, grn_stats: str = "image") -> None:
        super().__init__()
        if grn_stats not in GRN_STATS:
            raise ValueError(f"MaskedGRN: grn_stats must be one of {', '.join(GRN_STATS)}, got {grn_stats!r}")
        self.eps = eps
        self.grn_stats = grn_stats
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, tiles: TileIndex) -> Tensor:
        """[B, K, t, t, C] -> [B, K, t, t, C]."""
        return grn_on_tiles(x, self.weight, self.bias, self.eps, self.grn_stats)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, grn_stats={self.grn_stats}"


def grn_on_tiles(x: Tensor, weight: Tensor, bias: Tensor, eps: float, grn_stats: str) -> Tensor:
    """[B, K, t, t, C] -> [B, K, t, t, C], see `MaskedGRN`."""
    response = _norm(x, (1, 2, 3) if grn_stats == "image" else (0, 1, 2, 3))  # [B or 1, 1, 1, 1, C]
    relative = response / (response.mean(dim=-1, keepdim=True) + eps)
    # One pass over x. In half precision the 1 would swallow a small weight * relative, so the factor stays wide.
    return torch.addcmul(bias, x, 1 + weight * relative).to(x.dtype)


def _norm(x: Tensor, over: tuple[int, ...]) -> Tensor:
    """L2 norm over dimensions that lie outside of the channels; fp32 from half precision."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return torch.linalg.vector_norm(x, dim=over, keepdim=True, dtype=torch.float32)
    # On the CPU four times faster than vector_norm, which does not vectorise over channels. The tiny number keeps the
    # gradient at zero (not NaN) for a channel that is zero everywhere.
    return (x.square().sum(over, keepdim=True) + 1e-30).sqrt()
