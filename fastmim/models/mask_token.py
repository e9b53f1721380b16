"""A learnable token at the removed positions of a feature map.

Legend: B batch, C channels, N tokens, h w map.
"""

from typing import Literal

import torch
from torch import Tensor, nn


class MaskToken(nn.Module):
    """Put a token t [C] where the mask m is True; x is unchanged elsewhere.

    replace=True (SimMIM): x <- t. replace=False (A²MIM): x <- x + t, or x <- γ·x + t with a gate γ [C], which starts
    at 1e-6 in the CNN recipes, so that what leaked into removed cells through earlier convolutions begins as nothing.

    Args:
        channels: C of the features at the insertion point.
        layout: "tokens" [B, N, C] or "map" [B, C, h, w].
        replace: the token takes the place of the features.
        gate: initial value of γ; None has no gate. Refused together with `replace`, where it would multiply nothing.
        detach: stop gradients at the removed features (an option of the authors' code, off in all their recipes).

    Both parameters are one-dimensional, so they are not decayed. Source: SimMIM (arXiv 2111.09886), A²MIM (2205.13943).
    """

    def __init__(
        self,
        channels: int,
        layout: Literal["tokens", "map"],
        *,
        replace: bool,
        gate: float | None = None,
        detach: bool = False,
    ) -> None:
        super().__init__()
        if replace and gate is not None:
            raise ValueError(
                f"MaskToken: replace=True leaves nothing for a gate to multiply, but gate={gate} was given."
            )
        self.layout = layout
        self.replace = replace
        self.detach = detach
        self.token = nn.Parameter(torch.empty(channels))
        nn.init.trunc_normal_(self.token, std=0.02)
        self.gate = None if gate is None else nn.Parameter(torch.full((channels,), float(gate)))

    def forward(self, x: Tensor, removed: Tensor) -> Tensor:
        """x: [B, N, C] or [B, C, h, w]; removed: bool [B, h, w], True = removed. Returns x's shape and dtype."""
        token = self._per_channel(self.token, x)
        where = removed.flatten(1).unsqueeze(-1) if self.layout == "tokens" else removed.unsqueeze(1)
        if self.replace:
            return torch.where(where, token, x)
        hidden = x.detach() if self.detach else x
        if self.gate is not None:
            hidden = hidden * self._per_channel(self.gate, x)
        return torch.where(where, hidden + token, x)

    def _per_channel(self, parameter: Tensor, x: Tensor) -> Tensor:
        """[C] broadcast over the positions of x, in the dtype of x (half precision under autocast)."""
        return (
            parameter.to(x.dtype).view(1, 1, -1) if self.layout == "tokens" else parameter.to(x.dtype).view(1, -1, 1, 1)
        )
