"""What each fusion and each pruning brings: our step against our step with that one thing done the plain way."""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

from torch import Tensor, nn

from fastmim.layers import FusedAttention, FusedBeitAttention
from fastmim.ops.backends import operations

Switch = Callable[[Any], AbstractContextManager[Any]]  # method -> what a step without the thing runs in


def _reference(op: str) -> Switch:
    """The operation in plain PyTorch."""

    def off(method: Any) -> AbstractContextManager[Any]:
        return mock.patch.object(operations()[op], "choose", return_value="reference")

    return off


def _products(method: Any) -> AbstractContextManager[Any]:
    """Matrix products by the library that torch would take."""
    return mock.patch.object(importlib.import_module("fastmim.ops.linear"), "_chosen", return_value=False)


def _attention(method: Any) -> AbstractContextManager[Any]:
    """torch's attention, with its copies into another layout."""
    for module in method.modules():
        if isinstance(module, FusedAttention | FusedBeitAttention):
            module.attention = "sdpa"
    return nullcontext()


def _shared_first_block(method: Any) -> AbstractContextManager[Any]:
    """LayerNorm and projection of the decoder's first block for the removed patches of every image."""
    method.decoder.share_masked = False
    return nullcontext()


def _pruning(method: Any) -> AbstractContextManager[Any]:
    """MAE: the last decoder block for all patches; SimMIM, A²MIM: everything for all patches."""
    method.cfg.exact_pruning = method.prunes = False
    return nullcontext()


_ALL: dict[str, Switch] = {
    "faster matrix products": _products,
    "packed attention": _attention,
    "fused masked loss": _reference("masked_patch_loss"),
    "fused mask": _reference("random_mask"),
}
_TRUNK = {"exact pruning of removed patches": _pruning}
_PIECES: dict[str, dict[str, Switch]] = {
    "mae": {
        **_ALL,
        "visible patch embedding kernel": _reference("visible_patch_embed"),
        "decoder input kernel": _reference("decoder_input"),
        "shared first decoder block": _shared_first_block,
        "pruned last decoder block": _pruning,
    },
    "mixedae": {
        **{name: _ALL[name] for name in ("faster matrix products", "packed attention", "fused masked loss")},
        "fused mixing map": _reference("mixing_map"),
        "patch mixing kernel": _reference("patch_mix"),
        "top-k attention kernel": _reference("topk_attention"),
        "contrastive kernels": _reference("homologous_contrastive"),
        "shared first decoder block": _shared_first_block,
        "pruned decoder": _pruning,
    },
    "simmim": {**_ALL, **_TRUNK},
    "a2mim": {**_ALL, "fused frequency loss": _reference("frequency_loss"), **_TRUNK},
}


def pieces(method: str) -> dict[str, Switch]:
    """Name -> how to leave it out, for the methods on ViTs."""
    return _PIECES.get(method, {})


def without(run: Callable[[Tensor], None], method: nn.Module, switch: Switch) -> Callable[[Tensor], None]:
    """The step `run` of `method` with one thing switched off."""

    def plainer(images: Tensor) -> None:
        with switch(method):
            run(images)

    return plainer
