"""Swaps the attention and blocks of a timm ViT for fused ones, in place."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastmim.layers.attention_providers import check_provider
from fastmim.layers.drop_path import drop_path
from fastmim.layers.fused_attention import FusedAttention
from fastmim.layers.fused_beit import FusedBeitAttention, FusedBeitBlock
from fastmim.layers.fused_block import FusedBlock
from fastmim.layers.linear import Linear
from fastmim.layers.mlp import LayerScale

__all__ = ["Acceleration", "accelerate"]


@dataclass
class Acceleration:
    """What `accelerate` did; `print` shows it."""

    swapped: dict[str, str] = field(default_factory=dict)
    """Name of a module -> the class that it has now."""
    kept: dict[str, str] = field(default_factory=dict)
    """Name of a module that was left as it is -> why."""

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for kind in self.swapped.values():
            counts[kind] = counts.get(kind, 0) + 1
        first = f"swapped {', '.join(f'{n} {kind}' for kind, n in counts.items()) or 'nothing'}"
        return "\n".join([first, *(f"kept {name}: {why}" for name, why in self.kept.items())])


class _Unfit(Exception):
    """Why a module cannot be swapped."""


def accelerate(vit: nn.Module, *, attention: str = "fastmim") -> Acceleration:
    """Swap `Attention` and `Block` of timm's `vision_transformer` and `beit`, and the linear layers in them, in place.

    Parameters, norms and activations stay the very objects that they are: the state dict has the same keys, an
    optimiser built before goes on, and outputs are the same up to rounding. A module that carries hooks, is of another
    class of timm or of a subclass, or has a part that ours lacks is left alone and named.

    Args:
        vit: a timm model, or any module that contains such blocks.
        attention: whose attention runs; see `FusedAttention`.

    Returns:
        What was swapped, and what was kept and why.

    Raises:
        ValueError: a provider that is not installed; or there is no attention in `vit` at all.
    """
    check_provider(attention)
    report = Acceleration()
    _visit(vit, "", attention, report)
    if not report.swapped and not report.kept:
        raise ValueError(f"accelerate: {type(vit).__name__} contains no attention with a packed projection (qkv)")
    return report


def _visit(parent: nn.Module, prefix: str, attention: str, report: Acceleration) -> None:
    """Swap what is inside before what is around it, so that a block is given an attention that was swapped."""
    for name, child in list(parent.named_children()):
        path = f"{prefix}{name}"
        _visit(child, f"{path}.", attention, report)
        swap = _SWAPS.get(_timm_class(child))
        if swap is None:
            if isinstance(getattr(child, "qkv", None), nn.Module) and not isinstance(child, _FUSED):
                report.kept[path] = f"{type(child).__module__}.{type(child).__name__} is no class that accelerate knows"
            continue
        try:
            fused = swap(_unhooked(child), attention)
        except _Unfit as why:
            report.kept[path] = str(why)
            continue
        setattr(parent, name, fused.train(child.training))
        report.swapped[path] = type(fused).__name__
        _swap_linears(fused, f"{path}.", report)


def _timm_class(module: nn.Module) -> str:
    """ "vit.Block" and the like for the classes of timm that can be swapped, "" for all others."""
    home = {
        "timm.models.vision_transformer": "vit",
        "timm.layers.attention": "vit",
        "timm.models.beit": "beit",
    }.get(type(module).__module__)
    return f"{home}.{type(module).__qualname__}" if home else ""


def _unhooked(module: nn.Module) -> Any:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in hooks):
        raise _Unfit("it carries hooks, which the new module would not run")
    return module


def _adopt(fused: Any, old: Any, parts: tuple[str, ...]) -> Any:
    """Give `fused` the modules, parameters and buffers `parts` of `old`; refuse whatever else `old` computes with."""
    owned = {**old._modules, **old._parameters, **old._buffers}
    others = [k for k, v in owned.items() if k not in parts and not (v is None or isinstance(v, nn.Identity))]
    if others:
        raise _Unfit(f"it has {', '.join(others)}, which {type(fused).__name__} lacks")
    for name in parts:
        part = owned.get(name)
        if name in owned and not (part is None and hasattr(fused, name)):
            # What was a module, a parameter or None becomes whichever of these it is in `old`.
            for kind in (fused._modules, fused._parameters, fused._buffers):
                kind.pop(name, None)
            if name in old._buffers:
                fused.register_buffer(name, part, persistent=name not in old._non_persistent_buffers_set)
            else:
                setattr(fused, name, part)
    return fused


def _vit_attention(old: Any, attention: str) -> nn.Module:
    heads, width = old.num_heads, old.proj.in_features
    with torch.device("meta"):
        fused = FusedAttention(
            old.qkv.in_features, heads, width // heads, old.proj.out_features, gated=False, attention=attention
        )
    fused.scale = float(old.scale)
    return _adopt(fused, old, ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"))


def _beit_attention(old: Any, attention: str) -> nn.Module:
    heads, width = old.num_heads, old.proj.in_features
    with torch.device("meta"):
        fused = FusedBeitAttention(old.qkv.in_features, heads, attn_head_dim=width // heads, attention=attention)
    fused.scale = float(old.scale)
    fused.qkv_bias_separate = bool(getattr(old, "qkv_bias_separate", False))
    parts = ("qkv", "q_bias", "v_bias", "relative_position_bias_table", "relative_position_index", "attn_drop")
    fused = _adopt(fused, old, (*parts, "k_bias", "proj", "proj_drop"))
    del fused.k_bias  # timm's buffer of zeros
    return fused


def _vit_block(old: Any, attention: str) -> nn.Module:
    _check_swapped(old.attn, FusedAttention)
    with torch.device("meta"):
        fused = FusedBlock(old.norm1.normalized_shape[0], 1)
    _adopt(fused, old, ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"))
    fused.ls1, fused.ls2 = _layer_scale(old.ls1), _layer_scale(old.ls2)
    fused.drop_path1, fused.drop_path2 = _drop_path(old.drop_path1), _drop_path(old.drop_path2)
    return fused


def _beit_block(old: Any, attention: str) -> nn.Module:
    _check_swapped(old.attn, FusedBeitAttention)
    with torch.device("meta"):
        fused = FusedBeitBlock(old.norm1.normalized_shape[0], 1)
    _adopt(fused, old, ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2", "gamma_1", "gamma_2"))
    fused.drop_path1, fused.drop_path2 = _drop_path(old.drop_path1), _drop_path(old.drop_path2)
    return fused


def _check_swapped(attn: nn.Module, kind: type[nn.Module]) -> None:
    if not isinstance(attn, kind):
        raise _Unfit(f"its attention ({type(attn).__name__}) was kept")


def _layer_scale(old: Any) -> Any:
    if isinstance(old, nn.Identity):
        return old
    with torch.device("meta"):
        new = LayerScale(old.gamma.shape[0])
    new.gamma = old.gamma
    return new


def _drop_path(old: Any) -> nn.Module:
    if isinstance(old, nn.Identity):
        return old
    if not getattr(old, "scale_by_keep", True):
        raise _Unfit("its stochastic depth does not scale what it keeps")
    return drop_path(float(old.drop_prob))


def _swap_linears(module: nn.Module, prefix: str, report: Acceleration) -> None:
    """Plain linear layers inside; those of a subclass, or with hooks, stay."""
    for name, child in list(module.named_children()):
        if type(child) is nn.Linear and not child._forward_hooks and not child._forward_pre_hooks:
            new = Linear(child.in_features, child.out_features, bias=child.bias is not None, device="meta")
            new.weight, new.bias = child.weight, child.bias
            setattr(module, name, new.train(child.training))
            report.swapped[f"{prefix}{name}"] = "Linear"
        else:
            _swap_linears(child, f"{prefix}{name}.", report)


_FUSED = (FusedAttention, FusedBeitAttention)
_SWAPS = {
    "vit.Attention": _vit_attention,
    "vit.Block": _vit_block,
    "beit.Attention": _beit_attention,
    "beit.Block": _beit_block,
}
