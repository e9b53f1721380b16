"""LAMB (arXiv 1904.00962): AdamW whose step is rescaled, tensor by tensor, to the norm of the weights.

Meaning, for each tensor p with gradient g (the same as NVIDIA's FusedLAMB and timm's Lamb):
m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g²,  u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + decay p,
p <- p - lr r u, where r = |p| / |u| if decay is not zero and neither norm is, else 1.

Their built-in clipping is left to `optim.clip_grad_norm`, which clips for every optimiser.
"""

import functools
import importlib
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Lamb", "apex_lamb", "create_lamb", "find_apex"]

logger = logging.getLogger(__name__)


def create_lamb(
    groups: list[dict],
    *,
    betas: tuple[float, float],
    eps: float,
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> torch.optim.Optimizer:
    """LAMB over groups that have "params", "lr" and "weight_decay": NVIDIA's fused kernels where they can run (a GPU,
    and an apex built with them), else `Lamb`. Both make the same steps and keep the same state. `add_up`: see `Lamb`;
    apex knows whole tensors only."""
    fused = find_apex() if groups[0]["params"][0].device.type == "cuda" and add_up is None else None
    if fused is None:
        return Lamb(groups, betas=betas, eps=eps, add_up=add_up)
    logger.info("LAMB: NVIDIA's apex is found, its FusedLAMB is used.")
    for group in groups:
        group["lr"] = float(group["lr"])  # kernel arguments there
        group.pop("decay", None)
    return apex_lamb(fused)(groups, lr=0.0, betas=betas, eps=eps)


class _KeepsSteps(torch.optim.Optimizer):
    """State as `fastmim.engine.optimizer` saves it: "step", "exp_avg" and "exp_avg_sq" of every parameter."""

    found_inf: Tensor | None = None
    """Scalar on the device of the parameters: 1 makes a step leave everything as it was."""

    def _trained(self, group: dict[str, Any]) -> list[Tensor]:
        """The parameters that have a gradient, each with its state."""
        trained = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in trained:
            state = self.state[parameter]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return trained

    def _bad(self, device: torch.device) -> Tensor:
        """Must this step change nothing? Scalar bool."""
        if self.found_inf is None:
            return torch.zeros((), dtype=torch.bool, device=device)
        return self.found_inf.reshape(()).to(device) != 0

    def _states(self, key: str, trained: Iterable[Tensor]) -> list[Tensor]:
        return [self.state[parameter][key] for parameter in trained]


class Lamb(_KeepsSteps):
    """LAMB as operations over lists of tensors.

    Nothing in a step waits for the host: `lr` of a group may be a tensor, its decay too (under "decay", which then
    takes the place of "weight_decay"), and where `found_inf` is 1 gradients count as zero, averages decay by 1 and the
    step is multiplied by 0. The parameters of a group count their steps together, as
    in FusedLAMB.

    Args:
        params: parameters, or groups of them, each with its own "lr" and "weight_decay" if wanted.
        lr: learning rate, a number or a scalar tensor.
        betas: decay of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: decay inside of the rescaled step; groups without decay are not rescaled.
        add_up: where each process holds some rows of every parameter, makes sums over these sums over all rows.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        add_up: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._add_up = add_up
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if trained := self._trained(group):
                self._step(group, trained)

    def _step(self, group: dict[str, Any], trained: list[Tensor]) -> None:
        beta1, beta2 = group["betas"]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        steps, averages, squares = (self._states(key, trained) for key in ("step", "exp_avg", "exp_avg_sq"))
        bad = self._bad(gradients[0].device)
        for gradient in gradients if self.found_inf is not None else ():
            gradient.masked_fill_(bad, 0.0)  # NaN times zero would be NaN
        alive = 1.0 - bad.double()  # scalars in fp64, so that betas keep their digits
        torch._foreach_add_(steps, alive.to(steps[0].dtype), alpha=1)  # without alpha it would ask the host

        def scalar(value: Tensor) -> Tensor:
            return value.to(trained[0].dtype)

        torch._foreach_mul_(averages, scalar(1 - (1 - beta1) * alive))
        torch._foreach_add_(averages, gradients, alpha=1 - beta1)
        torch._foreach_mul_(squares, scalar(1 - (1 - beta2) * alive))
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)

        count = steps[0].double().clamp(min=1)  # 0 before the first step that counts; the averages are zero then
        correction1, correction2 = 1 - beta1**count, 1 - beta2**count
        denominators = list(torch._foreach_sqrt(squares))
        torch._foreach_mul_(denominators, scalar(correction1 / correction2.sqrt()))
        torch._foreach_add_(denominators, scalar(group["eps"] * correction1), alpha=1)
        updates = list(torch._foreach_div(averages, denominators))
        rate = scalar(alive * group["lr"])
        if "decay" in group:
            torch._foreach_add_(updates, torch._foreach_mul(trained, group["decay"]), alpha=1)
            torch._foreach_mul_(updates, list((_trust(trained, updates, self._add_up) * rate).unbind()))
        elif group["weight_decay"] != 0:
            torch._foreach_add_(updates, trained, alpha=group["weight_decay"])
            torch._foreach_mul_(updates, list((_trust(trained, updates, self._add_up) * rate).unbind()))
        else:
            torch._foreach_mul_(updates, rate)
        torch._foreach_sub_(trained, updates)


def _trust(weights: list[Tensor], updates: list[Tensor], add_up: Callable[[Tensor], Tensor] | None) -> Tensor:
    """|p| / |u| of every pair, 1 where one of them is zero. [number of tensors]"""
    norms = torch.stack(list(torch._foreach_norm([*weights, *updates])))
    if add_up is not None:
        norms = add_up(norms.square()).sqrt()
    weight, update = norms.chunk(2)
    return torch.where((weight > 0) & (update > 0), weight / update, 1.0)


@functools.cache
def find_apex() -> Any:
    """NVIDIA's `FusedLAMB`, or None where apex, or its compiled part `amp_C`, is not there."""
    try:
        importlib.import_module("amp_C")
        return importlib.import_module("apex.optimizers").FusedLAMB
    except (ImportError, AttributeError, OSError):  # other packages are called apex as well
        return None


def apex_lamb(fused: Any) -> Any:
    """`FusedLAMB` as the engine needs it: state under the engine's names, and steps that `found_inf` undoes.

    Its kernels run whatever the gradients hold, so what they change is kept and put back where `found_inf` is 1; that
    takes three copies of the parameters. A step undone still counts in the correction of its averages.
    """

    class ApexLamb(_KeepsSteps, fused):  # type: ignore[misc, valid-type]
        def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float) -> None:
            fused.__init__(self, groups, lr=lr, betas=tuple(betas), eps=eps, weight_decay=0.0, max_grad_norm=math.inf)

        def zero_grad(self, set_to_none: bool = True) -> None:
            torch.optim.Optimizer.zero_grad(self, set_to_none)

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            groups = [(group, self._trained(group)) for group in self.param_groups]
            trained = [parameter for _, parameters in groups for parameter in parameters]
            for group, parameters in groups:
                if "step" not in group and parameters:  # the first one, perhaps of a resumed run
                    group["step"] = int(self.state[parameters[0]]["step"])
            changed = [*trained, *self._states("exp_avg", trained), *self._states("exp_avg_sq", trained)]
            kept = [tensor.clone() for tensor in changed] if self.found_inf is not None else []
            fused.step(self)
            bad = self._bad(trained[0].device)
            for tensor, old in zip(changed, kept, strict=False):
                torch.where(bad, old, tensor, out=tensor)
            torch._foreach_add_(self._states("step", trained), 1.0 - bad.float(), alpha=1)

    return ApexLamb
