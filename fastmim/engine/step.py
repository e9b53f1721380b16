"""One training step, on the device from end to end: nothing in it waits for, or is decided by, the host."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmim.engine.clipping import clip_gradients, gradient_norms
from fastmim.engine.ema import Ema
from fastmim.engine.injector import inject
from fastmim.engine.optimizer import named_parameters
from fastmim.engine.precision import autocast
from fastmim.engine.settings import OptimConfig
from fastmim.methods import Batch, Method, Pictures


@dataclass
class StepOutput:
    """Device tensors; reading them is the trainer's business."""

    loss: Tensor  # scalar, mean over the micro-batches
    parts: dict[str, Tensor]  # the method's named scalars, likewise
    grad_norm: Tensor  # scalar, before clipping
    pictures: Callable[[], Pictures] | None  # of the last micro-batch, where asked for


class TrainStep:
    """forward, backward, clip, finite check, optimiser, EMA.

    A step with a non-finite loss or gradient leaves weights and optimiser as they were: the check feeds `found_inf` of
    the fused optimiser. With `stop`, so do all steps after it until the host has noticed; without, the buffers (batch
    norm statistics) that its forward pass spoiled are put back too and training goes on.

    `bad_steps` counts such steps and `first_bad` is the index of the first, or -1; both are device tensors.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        optim: OptimConfig,
        *,
        precision: str,
        device: torch.device,
        seed: int,
        micro_batch: int,
        stop: bool,
        ema: Ema | None,
    ) -> None:
        self.method, self.optimizer, self.optim, self.ema = method, optimizer, optim, ema
        self.precision, self.device, self.stop = precision, device, stop
        self.named = named_parameters(optimizer)
        # One (seed, step, first) per micro-batch, kept and refilled: autograd may hold on to it until backward.
        self.rng = [torch.tensor([seed, 0, i * micro_batch], device=device) for i in range(optim.accumulate)]
        self.micro_batch = micro_batch
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.norms: list[tuple[str, Tensor]] = []  # gradient norm of each parameter in the latest step
        self._buffers = [] if stop else list(method.buffers())
        self._kept = [buffer.clone() for buffer in self._buffers]

    def __call__(
        self, images: Tensor, labels: Tensor | None, indices: Tensor | None, step: int, *, pictures: bool = False
    ) -> StepOutput:
        """Do step `step` (counted from 0) on a normalised batch that lies on the device."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)
        output = self._gradients(images, labels, indices, step, pictures)
        gradients = [parameter.grad for _, parameter in self.named if parameter.grad is not None]
        norms, total = gradient_norms(gradients)
        self.norms = list(zip((n for n, p in self.named if p.grad is not None), norms, strict=True))
        output.grad_norm = total

        bad = ~(torch.isfinite(total) & torch.isfinite(output.loss))
        self.first_bad.copy_(torch.where(bad & (self.first_bad < 0), self.rng[0][1], self.first_bad))
        self.bad_steps.add_(bad)
        if self.stop:
            bad = self.bad_steps > 0
        if self.optim.clip_grad_norm is not None:
            clip_gradients(gradients, norms, total, self.optim.clip_grad_norm, self.optim.clip_mode)
        self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()

        with torch.no_grad():
            self.method.after_step(step)
            for buffer, kept in zip(self._buffers, self._kept, strict=True):
                buffer.copy_(torch.where(bad, kept, buffer))
        if self.ema is not None:
            self.ema.update()
        return output

    def _gradients(
        self, images: Tensor, labels: Tensor | None, indices: Tensor | None, step: int, pictures: bool
    ) -> StepOutput:
        """Forward and backward over the micro-batches."""
        self.optimizer.zero_grad(set_to_none=True)
        count = self.optim.accumulate
        result = StepOutput(torch.zeros((), device=self.device), {}, torch.zeros((), device=self.device), None)
        for i, rng in enumerate(self.rng):
            rng[1].fill_(step)
            rows = slice(i * self.micro_batch, (i + 1) * self.micro_batch)
            batch = Batch(
                images[rows], rng, None if labels is None else labels[rows], None if indices is None else indices[rows]
            )
            with autocast(self.precision, self.device):
                output = self.method(batch)
            loss = output.loss / count if count > 1 else output.loss
            if inject("loss", step + 1):
                loss = loss * float("nan")
            loss.backward()
            result.loss = result.loss + loss.detach()
            for name, part in output.parts.items():
                result.parts[name] = result.parts.get(name, 0) + part.detach() / count
            if pictures and i == count - 1:
                result.pictures = output.pictures
        if inject("grad", step + 1):
            next(p.grad for _, p in self.named if p.grad is not None).fill_(float("nan"))
        return result
