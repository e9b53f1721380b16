"""Lets a batch norm on tiles do what follows it: stochastic depth, the sum with a shortcut, the ReLU.

A residual block then passes over its maps twice where it passed four times, and keeps fewer of them for the backward
pass. What is fused has no other reader, so nobody can tell the difference.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastmim.layers.masked_batch_norm import MaskedBatchNorm2d
from fastmim.layers.tile_layers import drop_path_factor, drop_path_on_tiles
from fastmim.layers.traced import Map

__all__ = ["fuse_norms"]

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")


def fuse_norms(graph: fx.Graph, module: nn.Module) -> None:
    """Changes `graph`, a forward of `module` on tiles whose nodes know their kinds."""
    norms = [node for node in graph.nodes if _is_norm(node)]
    layers = [norm.args[0].target for norm in norms]
    for norm in norms:
        _fuse(graph, module, norm, may_wait=layers.count(norm.args[0].target) == 1)


def _fuse(graph: fx.Graph, module: nn.Module, norm: fx.Node, may_wait: bool) -> None:
    """`may_wait`: nobody else sees when it updates its running statistics."""
    chain, parts = [norm], dict(norm.kwargs)
    drop = total = None
    while (node := _only_reader(chain[-1])) is not None:
        if _layer(module, node, nn.Identity):
            pass
        elif may_wait and _is_drop_path(node) and drop is None and total is None:
            drop = node
        elif may_wait and total is None and (shortcut := _other_term(node, chain[-1], norm)) is not None:
            total, parts["residual"] = node, shortcut
        elif _layer(module, node, nn.ReLU) or _is_relu(node):
            parts["relu"] = True
            chain.append(node)
            break
        else:
            break
        chain.append(node)
    while _layer(module, chain[-1], nn.Identity):
        chain.pop()
    if len(chain) == 1:
        return
    if drop is not None:
        with graph.inserting_before(drop):
            parts["factor"] = graph.call_function(drop_path_factor, (drop.args[0], norm.args[1]))
    # The sum is where its other term is known; what it waits for there has this norm as its only reader.
    with graph.inserting_before(norm if total is None and drop is None else total or drop):
        fused = graph.create_node("call_function", MaskedBatchNorm2d.forward, norm.args, parts, norm.name)
    fused.meta.update(chain[-1].meta)
    chain[-1].replace_all_uses_with(fused)
    for node in reversed(chain):
        graph.erase_node(node)


def _is_norm(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is MaskedBatchNorm2d.forward


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _layer(module: nn.Module, node: fx.Node, kind: type[nn.Module]) -> bool:
    """Is it a call of such a layer, which does nothing else?"""
    if node.op != "call_module":
        return False
    layer = module.get_submodule(str(node.target))
    return type(layer) is kind and not layer._forward_hooks and not layer._forward_pre_hooks


def _is_drop_path(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is drop_path_on_tiles


def _is_relu(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in _RELUS


def _other_term(node: fx.Node, term: fx.Node, norm: fx.Node) -> Any:
    """What `node` adds to `term`, if it is a map of the same shape and the norm may wait for it."""
    if node.op not in ("call_function", "call_method") or node.target not in _SUMS or node.kwargs:
        return None
    if len(node.args) != 2 or len(norm.args[1].users) != 1:  # type: ignore[union-attr]
        return None
    others = [arg for arg in node.args if arg is not term]
    same = others and isinstance(others[0], fx.Node) and others[0].meta.get("kind") == norm.meta.get("kind")
    return others[0] if same and isinstance(norm.meta.get("kind"), Map) else None
