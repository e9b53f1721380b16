"""One training step, on the device from end to end: nothing in it waits for, or is decided by, the host.

So a step can be captured as a graph (`fastmim.engine.capture`): what changes from step to step lies in device tensors
that `begin` fills (the index of the step, and by the optimiser's `set_lr` the rates), everything else is fixed.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmim.engine.clipping import clip_gradients, gradient_norms
from fastmim.engine.data_parallel import DataParallel
from fastmim.engine.ema import Ema
from fastmim.engine.fully_sharded import FullySharded
from fastmim.engine.injector import inject, injecting
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

    Args:
        first: index in the global batch of the first image of this process; the masks of an image depend on its place.
        parallel: the method's forward where several processes train, averaging gradients; None where there is one.
        agree: given a flag on the device (0 or 1, fp32), makes it 1 in all processes where it is 1 in any: a step that
            is bad for one process is then bad for all. None where there is only one.
        schedules: the method's own, by name; `begin` fills in what they say of a step.
        weight_cache: whether autocast may keep a weight's bf16 copy for its second use in a step; not under a graph.
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
        first: int = 0,
        parallel: DataParallel | FullySharded | None = None,
        agree: Callable[[Tensor], None] | None = None,
        weight_cache: bool = True,
        schedules: Mapping[str, Callable[[int], float]] | None = None,
    ) -> None:
        self.method, self.optimizer, self.optim, self.ema = method, optimizer, optim, ema
        self.precision, self.device, self.stop = precision, device, stop
        self.parallel, self.agree, self.weight_cache = parallel, agree, weight_cache
        self.named = named_parameters(optimizer)
        # One (seed, step, first) per micro-batch, kept and refilled: autograd may hold on to it until backward.
        self.rng = [torch.tensor([seed, 0, first + i * micro_batch], device=device) for i in range(optim.accumulate)]
        self.micro_batch = micro_batch
        self.index = torch.zeros((), dtype=torch.int64, device=device)  # of the step to do; counts by itself
        self._schedules = dict(schedules or {})
        self.scheduled = {name: torch.zeros((), device=device) for name in self._schedules}
        self._next = 0  # the same, as far as the host knows
        self._spoil = torch.ones(2, device=device) if injecting() else None  # for tests: factors of loss and gradient
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self.norms: list[tuple[str, Tensor]] = []  # gradient norm of each parameter in the latest step
        self._buffers = [] if stop else list(method.buffers())
        self._kept = [buffer.clone() for buffer in self._buffers]

    def __call__(
        self,
        images: Tensor,
        labels: Tensor | None,
        indices: Tensor | None,
        step: int,
        *,
        views: Mapping[str, Tensor] | None = None,
        pictures: bool = False,
    ) -> StepOutput:
        """Do step `step` (counted from 0) on a normalised batch that lies on the device."""
        self.begin(step)
        return self.run(images, labels, indices, views=views, pictures=pictures)

    def begin(self, step: int) -> None:
        """What the host has to say of step `step`, into device tensors. Before each `run`, captured or not."""
        if step != self._next:
            self.index.fill_(step)
        self._next = step + 1
        for name, value in self.scheduled.items():
            value.fill_(self._schedules[name](step))
        spoilt = [inject("loss", step + 1), inject("grad", step + 1)]
        if self._spoil is not None:
            self._spoil.copy_(torch.tensor(spoilt))

    def run(
        self,
        images: Tensor,
        labels: Tensor | None,
        indices: Tensor | None,
        *,
        views: Mapping[str, Tensor] | None = None,
        pictures: bool = False,
    ) -> StepOutput:
        """The step that `begin` announced."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)
        output = self._gradients(images, labels, indices, views or {}, pictures)
        gradients = [parameter.grad for _, parameter in self.named if parameter.grad is not None]
        norms, total = gradient_norms(gradients, None if self.parallel is None else self.parallel.add_up)
        self.norms = list(zip((n for n, p in self.named if p.grad is not None), norms, strict=True))
        output.grad_norm = total

        bad = ~(torch.isfinite(total) & torch.isfinite(output.loss))
        if self.agree is not None:
            flag = bad.float()
            self.agree(flag)
            bad = flag > 0
        self.first_bad.copy_(torch.where(bad & (self.first_bad < 0), self.index, self.first_bad))
        self.bad_steps.add_(bad)
        if self.stop:
            bad = self.bad_steps > 0
        if self.optim.clip_grad_norm is not None:
            clip_gradients(gradients, norms, total, self.optim.clip_grad_norm, self.optim.clip_mode)
        self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()

        with torch.no_grad():
            self.method.after_step(self.index)
            for buffer, kept in zip(self._buffers, self._kept, strict=True):
                buffer.copy_(torch.where(bad, kept, buffer))
        if self.ema is not None:
            self.ema.update()
        self.index.add_(1)
        return output

    def _gradients(
        self,
        images: Tensor,
        labels: Tensor | None,
        indices: Tensor | None,
        views: Mapping[str, Tensor],
        pictures: bool,
    ) -> StepOutput:
        """Forward and backward over the micro-batches."""
        self.optimizer.zero_grad(set_to_none=True)
        count = self.optim.accumulate
        forward = self.method if self.parallel is None else self.parallel
        result = StepOutput(torch.zeros((), device=self.device), {}, torch.zeros((), device=self.device), None)
        for i, rng in enumerate(self.rng):
            rng[1].copy_(self.index)
            rows = slice(i * self.micro_batch, (i + 1) * self.micro_batch)
            batch = Batch(
                images[rows],
                rng,
                None if labels is None else labels[rows],
                None if indices is None else indices[rows],
                {name: view[rows] for name, view in views.items()},
                self.scheduled,
            )
            with nullcontext() if self.parallel is None else self.parallel.micro_batch(last=i == count - 1):
                with autocast(self.precision, self.device, cache=self.weight_cache):
                    inject("forward", self._next)
                    output = forward(batch)
                loss = output.loss / count if count > 1 else output.loss
                if self._spoil is not None:
                    loss = loss * self._spoil[0]
                loss.backward()
            result.loss = result.loss + loss.detach()
            for name, part in output.parts.items():
                result.parts[name] = result.parts.get(name, 0) + part.detach() / count
            if pictures and i == count - 1:
                result.pictures = output.pictures
        if self.parallel is not None:
            self.parallel.collect_gradients()
        if self._spoil is not None:
            next(p.grad for _, p in self.named if p.grad is not None and p.grad.numel()).mul_(self._spoil[1])
        return result
