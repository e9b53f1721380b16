"""Whose attention runs: ours, each of torch's, or that of a library that is installed, chosen by name.

Legend: B batch, N tokens, H heads, D head width.
"""

import importlib
import importlib.util
from contextlib import nullcontext
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmim.ops import attention, packed_attention

__all__ = ["PROVIDERS", "attend", "attend_apart", "check_provider"]

_SDPA = {
    "sdpa": None,  # torch chooses
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}
_PACKAGES = {"xformers": "xformers", "flash_attn": "flash-attn"}  # module -> name to install
_GPU_ONLY = ("sdpa_efficient", "sdpa_cudnn", "xformers", "flash_attn")
PROVIDERS = ("fastmim", *_SDPA, *_PACKAGES)


def check_provider(name: str) -> None:
    """Raises ValueError for a name that is not in `PROVIDERS`, or whose package is not installed."""
    if name not in PROVIDERS:
        raise ValueError(f"attention is one of {', '.join(PROVIDERS)}, but was given {name!r}")
    if name in _PACKAGES and importlib.util.find_spec(name) is None:
        raise ValueError(
            f"attention={name!r} needs the package {_PACKAGES[name]}, which is not installed: "
            f"`pip install {_PACKAGES[name]}` in a version that fits this torch, or choose 'fastmim' or 'sdpa'"
        )


def attend(
    qkv: Tensor,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    provider: str = "fastmim",
) -> Tensor:
    """softmax(scale q kᵀ + bias) v by the provider of that name.

    Args:
        qkv: [B, N, 3, H, D].
        bias: [H, N, N], [1, H, N, N] or [B, H, N, N], added to the scores.
        key_mask: [B, N] bool, True = this key may be attended to.
        scale: of the scores; D ** -0.5 when None.
        dropout: share of the attention weights that are dropped. Our kernels have none: with one, "fastmim" is "sdpa".
        provider: one of `PROVIDERS`.

    Returns:
        [B, N, H, D].

    Raises:
        ValueError: a provider that has no operator for such tensors.
    """
    if provider == "fastmim" and dropout == 0.0:
        return packed_attention(qkv, bias, key_mask=key_mask, scale=scale)
    q, k, v = qkv.unbind(2)
    return _attend(q, k, v, bias, key_mask, scale, dropout, provider)


def attend_apart(
    q: Tensor, kv: Tensor, *, scale: float | None = None, dropout: float = 0.0, provider: str = "fastmim"
) -> Tensor:
    """The same for queries [B, Nq, H, D] apart from their keys and values [B, Nk, 2, H, D] -> [B, Nq, H, D]."""
    if provider == "fastmim" and dropout == 0.0:
        return attention(q, kv, scale=scale)
    k, v = kv.unbind(2)
    return _attend(q, k, v, None, None, scale, dropout, provider)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float | None,
    dropout: float,
    provider: str,
) -> Tensor:
    if provider in _GPU_ONLY and q.device.type == "cpu":
        raise ValueError(
            f"attention={provider!r} has no CPU operator; on a CPU choose 'fastmim', 'sdpa' or 'sdpa_flash'"
        )
    bias = bias.unsqueeze(0) if bias is not None and bias.dim() == 3 else bias
    if provider == "flash_attn":
        return _flash_attn(q, k, v, bias, key_mask, scale, dropout)
    mask = _with_key_mask(bias, key_mask, q)
    if provider == "xformers":
        return _xformers(q, k, v, mask, scale, dropout)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    backend = _SDPA.get(provider)
    with nullcontext() if backend is None else sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2)


def _with_key_mask(bias: Tensor | None, key_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """One additive mask [B or 1, H or 1, Nq or 1, Nk] of both, in the dtype of the queries."""
    bias = None if bias is None else bias.to(q.dtype)
    if key_mask is None:
        return bias
    shut = torch.zeros(key_mask.shape, dtype=q.dtype, device=q.device).masked_fill(~key_mask, float("-inf"))
    shut = shut[:, None, None, :]
    return shut if bias is None else bias + shut


def _xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, dropout: float) -> Tensor:
    if mask is not None:
        # Its kernels want every size spelled out and rows that start at multiples of eight elements.
        keys = k.shape[1]
        mask = F.pad(mask.expand(q.shape[0], q.shape[2], q.shape[1], keys), (0, -keys % 8))[..., :keys]
    return _module("xformers.ops").memory_efficient_attention(q, k, v, attn_bias=mask, p=dropout, scale=scale)


def _flash_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    if bias is not None or key_mask is not None:
        given = "bias" if bias is not None else "key mask"
        raise ValueError(f"attention='flash_attn' takes no {given}; choose 'fastmim', 'sdpa' or 'xformers'")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"attention='flash_attn' takes fp16 and bf16, got {q.dtype}; use autocast or 'fastmim'")
    return _module("flash_attn").flash_attn_func(q, k, v, dropout_p=dropout, softmax_scale=scale)


def _module(name: str) -> ModuleType:
    return importlib.import_module(name)
