"""AdamW and LAMB over correctly grouped parameters, with a learning rate that a captured step can change."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmim.engine.checkpoint import check_fits
from fastmim.engine.lamb import create_lamb
from fastmim.engine.pieces import local_part
from fastmim.engine.settings import OptimConfig

__all__ = [
    "OptimConfig",
    "create_optimizer",
    "load_optimizer_state",
    "named_parameters",
    "optimizer_state",
    "parameter_groups",
    "set_lr",
    "set_weight_decay",
]


def parameter_groups(
    method: nn.Module, weight_decay: float, no_decay: Iterable[str] = (), lr_scales: Mapping[str, float] | None = None
) -> list[dict]:
    """Trained parameters grouped by (decayed or not, learning-rate scale), in the order of the method.

    Not decayed: biases, parameters with at most one dimension (norms, LayerScale), names in `no_decay`.
    Each group has "params" (their `local_part`s), "names", "weight_decay", "decays" (is it of the decayed?) and
    "lr_scale".

    Raises:
        ValueError: `lr_scales` names a parameter that is not there, or there is nothing to train.
    """
    lr_scales, no_decay = dict(lr_scales or {}), set(no_decay)
    named = list(method.named_parameters())
    unknown = sorted(set(lr_scales) - {name for name, _ in named})
    if unknown:
        raise ValueError(f"lr_scales names parameters that {type(method).__name__} does not have: {', '.join(unknown)}")
    groups: dict[tuple[bool, float], dict] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in no_decay
        scale = lr_scales.get(name, 1.0)
        new = {"params": [], "names": [], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        group = groups.setdefault((decays, scale), new | {"decays": decays})
        group["params"].append(local_part(parameter))
        group["names"].append(name)
    if not groups:
        raise ValueError(f"{type(method).__name__} has no parameter that requires a gradient: nothing to train")
    return list(groups.values())


class ScheduledAdamW(torch.optim.AdamW):
    """AdamW whose weight decay is a tensor, so that it may change in a captured step.

    torch's kernels take the decay as a number. Here the weights are multiplied by 1 - lr·decay beforehand, as
    they do first thing, and nothing is multiplied where `found_inf` is 1. Groups hold "decay", a tensor.
    """

    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["decays"] and trained:
                factor = 1.0 - group["lr"] * group["decay"]
                if self.found_inf is not None:
                    factor = torch.where(self.found_inf.reshape(()) != 0, torch.ones_like(factor), factor)
                torch._foreach_mul_(trained, factor)
        super().step()


def create_optimizer(
    method: nn.Module,
    optim: OptimConfig,
    *,
    rates_on_device: bool | None = None,
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> torch.optim.Optimizer:
    """The optimiser of a `Method` that lies on its device: fused AdamW, or LAMB.

    Both leave everything untouched where their `found_inf` tensor is 1: the finite check needs no host. AdamW is fused
    also because one kernel then reads and writes each tensor once. With `rates_on_device` (None: on a GPU) the learning
    rate, and a weight decay with a schedule, are tensors: changing them neither synchronises nor is baked into a
    captured step.

    Of spread parameters it is given the rows of this process; `add_up` then makes sums over these sums over all rows.
    """
    groups = parameter_groups(method, optim.weight_decay, method.no_weight_decay(), method.lr_scales())  # type: ignore[operator]
    device = groups[0]["params"][0].device
    as_tensors = device.type == "cuda" if rates_on_device is None else rates_on_device
    scheduled = as_tensors and optim.weight_decay_end is not None
    for group in groups:
        group["lr"] = torch.zeros((), device=device) if as_tensors else 0.0
        if scheduled and group["decays"]:
            group["decay"] = torch.full((), optim.weight_decay, device=device)
    if optim.name == "lamb":
        return create_lamb(groups, betas=optim.betas, eps=optim.eps, add_up=add_up)
    settings: dict[str, Any] = {"lr": groups[0]["lr"], "betas": optim.betas, "eps": optim.eps, "fused": True}
    if scheduled:
        for group in groups:
            group["weight_decay"] = 0.0  # the tensor decays
    kind = ScheduledAdamW if scheduled else torch.optim.AdamW
    optimizer = kind(groups, **settings, capturable=device.type == "cuda")
    optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[union-attr]  # eager steps are meant as well
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's learning rate to lr * its scale, without a host synchronisation."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]


def set_weight_decay(optimizer: torch.optim.Optimizer, weight_decay: float) -> None:
    """Set the decay of every group that decays."""
    for group in optimizer.param_groups:
        if "decay" in group:
            group["decay"].fill_(weight_decay)
        elif group["decays"]:
            group["weight_decay"] = weight_decay


STATE = ("step", "exp_avg", "exp_avg_sq")
"""What the optimiser keeps for each parameter that had a gradient: a count, and two tensors like the parameter."""


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors under "exp_avg/encoder.norm.weight" and the like."""
    return {
        f"{key}/{name}": value
        for name, parameter in named_parameters(optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put back what `optimizer_state` gave. Raises CheckpointError, with nothing changed, where it does not fit."""
    present = {key.partition("/")[2] for key in tensors}  # a parameter that never had a gradient has no state
    expected = {}
    for name, parameter in named_parameters(optimizer):
        if name in present:
            expected[f"step/{name}"] = torch.zeros((), device=parameter.device)
            expected[f"exp_avg/{name}"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            expected[f"exp_avg_sq/{name}"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    check_fits(f"{where}: optimizer", expected, tensors)
    for key, tensor in expected.items():
        tensor.copy_(tensors[key])
    for name, parameter in named_parameters(optimizer):
        if name in present:
            optimizer.state[parameter] = {key: expected[f"{key}/{name}"] for key in STATE}


def named_parameters(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """Every trained parameter with its name in the method."""
    return [pair for group in optimizer.param_groups for pair in zip(group["names"], group["params"], strict=True)]
