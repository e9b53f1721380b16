"""An exponential moving average of a method's weights."""

import torch
from torch import Tensor, nn

from fastmim.engine.pieces import local_part


class Ema:
    """average <- decay * average + (1 - decay) * weights after each step; buffers are followed as they are."""

    def __init__(self, method: nn.Module, decay: float) -> None:
        self.decay = decay
        # References to the method's tensors, detached; of spread ones the rows of this process.
        self._live = {name: local_part(tensor) for name, tensor in method.state_dict().items()}
        self.average = {name: tensor.clone() for name, tensor in self._live.items()}
        trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
        self._averaged = [name for name in self._live if name in trained]
        self._followed = [name for name in self._live if name not in trained]

    @torch.no_grad()
    def update(self) -> None:
        average, live = self.average, self._live
        if self._averaged:
            torch._foreach_lerp_(
                [average[n] for n in self._averaged], [live[n] for n in self._averaged], 1 - self.decay
            )
        if self._followed:
            torch._foreach_copy_([average[n] for n in self._followed], [live[n] for n in self._followed])

    def state_dict(self) -> dict[str, Tensor]:
        return self.average
