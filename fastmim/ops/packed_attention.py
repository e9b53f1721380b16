"""Attention over packed queries, keys and values, read where their projection wrote them and written where the next
projection reads.

Legend: B batch, N tokens, Nq queries, Nk keys, H heads, D head width.
"""

from typing import Any

import torch
from torch import Tensor

from fastmim.ops.attention_operators import ELEMENTS, WIDTHS, attention_backends

__all__ = ["attention", "attention_ref", "packed_attention", "packed_attention_ref"]


def attention_ref(
    q: Tensor,
    kv: Tensor,
    bias: Tensor | None = None,
    key_log_count: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """What the operation means, in plain PyTorch. Any device, any dtype, differentiable."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast("cpu" if q.device.type == "meta" else q.device.type, enabled=False):
        k, v = kv.to(dtype).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q.to(dtype) * scale, k)
        if bias is not None:
            scores = scores + bias.to(dtype)
        if key_log_count is not None:
            scores = scores + key_log_count.detach().to(dtype)[:, None, None, :]
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None, :], float("-inf"))
        no_key = (scores == float("-inf")).all(dim=-1, keepdim=True)
        weights = scores.masked_fill(no_key, 0).softmax(dim=-1).masked_fill(no_key, 0)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).to(q.dtype).contiguous()


def packed_attention_ref(
    qkv: Tensor,
    bias: Tensor | None = None,
    key_log_count: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same where queries, keys and values come from one projection."""
    return attention_ref(qkv[:, :, 0], qkv[:, :, 1:], bias, key_log_count, key_mask, scale)


def packed_attention(
    qkv: Tensor,
    bias: Tensor | None = None,
    key_log_count: Tensor | None = None,
    key_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale q kᵀ + bias) v for every head, without a copy into another layout on either side.

    Args:
        qkv: [B, N, 3, H, D], a view of what a linear layer of 3 * H * D outputs gives; fp32, bf16 or fp16 (fp64 on the
            reference). Any strides; the last dimension is best dense. Under autocast fp32 is cast to autocast's dtype.
        bias: added to the scores, [H, N, N] or [1, H, N, N] for all images, or [B, H, N, N]; any floating dtype. Its
            gradient has its dtype; that of a shared one is summed over the images in a fixed order.
        key_log_count: [B, N], floating, added to every score of a key: log n makes one key stand for n equal ones.
            No gradient.
        key_mask: [B, N] bool, True = this key may be attended to. A row without any key gives zeros.
        scale: of the scores; D ** -0.5 when None.
        backend: "reference", "cpu" or "triton"; chosen by device when None. The kernels take D = 32, 40, 48, 64, 80,
            96 and 128; any other is left to the reference.

    Returns:
        [B, N, H, D] in the dtype of qkv, dense, so that `.flatten(2)` is a view. Scores, softmax and sums in fp32.
        Differentiable with respect to qkv and bias; the backward pass is deterministic and keeps one number per row.

    Raises:
        ValueError: shapes or dtypes that do not fit, naming both; or a backend asked for by name that cannot run,
            with its reason.
    """
    op = "packed_attention"
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv must be [B, N, 3, H, D], got {list(qkv.shape)}")
    _check_scores(op, qkv, qkv.shape[1], qkv.shape[1], bias, key_log_count, key_mask)
    return _run(op, (_in_dtype_of_autocast(qkv),), bias, key_log_count, key_mask, scale, backend)


def attention(
    q: Tensor,
    kv: Tensor,
    bias: Tensor | None = None,
    key_log_count: Tensor | None = None,
    key_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """`packed_attention` for queries apart from their keys: cross-attention, or a block that only needs some rows.

    Args:
        q: [B, Nq, H, D].
        kv: [B, Nk, 2, H, D], of the dtype of q.
        bias: [H, Nq, Nk], [1, H, Nq, Nk] or [B, H, Nq, Nk]. This and everything else as `packed_attention` has it.

    Returns:
        [B, Nq, H, D].
    """
    op = "attention"
    if q.dim() != 4:
        raise ValueError(f"{op}: q must be [B, Nq, H, D], got {list(q.shape)}")
    wanted = (q.shape[0], kv.shape[1] if kv.dim() > 1 else 0, 2, *q.shape[2:])
    if kv.shape != wanted:
        raise ValueError(
            f"{op}: kv must be [{wanted[0]}, Nk, 2, {wanted[3]}, {wanted[4]}] for q {list(q.shape)}, "
            f"got {list(kv.shape)}"
        )
    if (kv.dtype, kv.device) != (q.dtype, q.device):
        raise ValueError(
            f"{op}: q and kv must share dtype and device, got {q.dtype} on {q.device} and {kv.dtype} on {kv.device}"
        )
    _check_scores(op, q, q.shape[1], kv.shape[1], bias, key_log_count, key_mask)
    tensors = _in_dtype_of_autocast(q), _in_dtype_of_autocast(kv)
    return _run(op, tensors, bias, key_log_count, key_mask, scale, backend)


def _run(
    op: str,
    tensors: Any,
    bias: Tensor | None,
    key_log_count: Tensor | None,
    key_mask: Tensor | None,
    scale: float | None,
    backend: str | None,
) -> Tensor:
    width, dtype = tensors[0].shape[-1], tensors[0].dtype
    scale = width**-0.5 if scale is None else float(scale)
    unfit = "" if width in WIDTHS else f"the kernels take head widths {', '.join(map(str, WIDTHS))}, this is {width}"
    chosen = attention_backends.choose(tensors[0].device, dtype, backend, unfit)
    if bias is not None and bias.dim() == 3:
        bias = bias.unsqueeze(0)
    if chosen == "reference":
        reference: Any = packed_attention_ref if op == "packed_attention" else attention_ref
        return reference(*tensors, bias, key_log_count, key_mask, scale)
    if bias is not None and bias.dtype not in ELEMENTS:
        bias = bias.to(torch.float32)
    if key_log_count is not None:
        key_log_count = key_log_count.detach().to(torch.float32)
    return getattr(torch.ops.fastmim, op)(*tensors, bias, key_log_count, key_mask, scale, chosen)[0]


def _in_dtype_of_autocast(x: Tensor) -> Tensor:
    if x.dtype == torch.float32 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _check_scores(
    op: str,
    q: Tensor,
    queries: int,
    keys: int,
    bias: Tensor | None,
    key_log_count: Tensor | None,
    key_mask: Tensor | None,
) -> None:
    """Raises ValueError in the caller's terms."""
    batch, (heads, width) = q.shape[0], q.shape[-2:]
    if not q.is_floating_point():
        raise ValueError(f"{op}: queries, keys and values must be floating point, got {q.dtype}")
    if width == 0 or keys == 0:
        raise ValueError(f"{op}: at least one key and one channel a head are needed, got {keys} keys of {width}")
    if bias is not None:
        shapes = [(heads, queries, keys), (1, heads, queries, keys), (batch, heads, queries, keys)]
        if bias.shape not in shapes:
            raise ValueError(
                f"{op}: bias must be {list(shapes[0])} or {list(shapes[2])} (heads, queries, keys), "
                f"got {list(bias.shape)}"
            )
        if not bias.is_floating_point():
            raise ValueError(f"{op}: bias must be floating point, got {bias.dtype}")
    for name, of_keys in (("key_log_count", key_log_count), ("key_mask", key_mask)):
        if of_keys is not None and of_keys.shape != (batch, keys):
            raise ValueError(f"{op}: {name} must be [{batch}, {keys}] (batch, keys), got {list(of_keys.shape)}")
    if key_log_count is not None and not key_log_count.is_floating_point():
        raise ValueError(f"{op}: key_log_count must be floating point (log of a count), got {key_log_count.dtype}")
    if key_mask is not None and key_mask.dtype != torch.bool:
        raise ValueError(f"{op}: key_mask must be bool (True = may be attended to), got {key_mask.dtype}")
    for name, other in (("bias", bias), ("key_log_count", key_log_count), ("key_mask", key_mask)):
        if other is not None and other.device != q.device:
            raise ValueError(f"{op}: {name} is on {other.device}, the queries on {q.device}; they must share a device")
