"""All tensors that training changes: the method's, the optimiser's, the average's. What a checkpoint holds."""

import torch
from torch import Tensor

from fastmim.engine.checkpoint import Checkpoint, check_fits
from fastmim.engine.ema import Ema
from fastmim.engine.optimizer import load_optimizer_state, optimizer_state
from fastmim.methods import Method


class TrainingState:
    def __init__(self, method: Method, optimizer: torch.optim.Optimizer, ema: Ema | None) -> None:
        self.method, self.optimizer, self.ema = method, optimizer, ema

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """By file of the checkpoint, then by name; the live tensors, not copies."""
        tensors = {"method": self.method.state_dict(), "optimizer": optimizer_state(self.optimizer)}
        if self.ema is not None:
            tensors["ema"] = self.ema.state_dict()
        return tensors

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        """Check everything, then copy. A checkpoint without an average starts one at its weights.

        Raises:
            CheckpointError: names, shapes or dtypes that do not fit; nothing has been changed then.
        """
        tensors, where = checkpoint.tensors, str(checkpoint.path)
        weights = tensors.get("method", {})
        average = tensors.get("ema", weights)
        check_fits(f"{where}: method", self.method.state_dict(), weights)
        if self.ema is not None:
            check_fits(f"{where}: ema", self.ema.average, average)
        load_optimizer_state(self.optimizer, tensors.get("optimizer", {}), where)
        for name, tensor in self.method.state_dict().items():
            tensor.copy_(weights[name])
        if self.ema is not None:
            for name, tensor in self.ema.average.items():
                tensor.copy_(average[name])
