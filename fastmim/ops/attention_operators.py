"""The operators behind fastmim.ops.packed_attention: one kernel serves queries packed with their keys and apart.

Legend: B batch, N tokens, Nq queries, Nk keys, H heads, D head width.
"""

from typing import Any

import torch
from torch import Tensor

from fastmim.ops.backends import Backends, compiled
from fastmim.ops.masked_patch_loss import ELEMENTS

__all__ = ["ELEMENTS", "WIDTHS", "attention_backends"]

WIDTHS = (32, 40, 48, 64, 80, 96, 128)  # head widths that the kernels take
attention_backends = Backends(
    "packed_attention",
    cpu="packed_attention",
    triton="fastmim.kernels.packed_attention",
    dtypes={"cpu": ELEMENTS, "triton": ELEMENTS},
)
_SCORES = "Tensor? bias, Tensor? key_log_count, Tensor? key_mask, float scale"
torch.library.define("fastmim::packed_attention", f"(Tensor qkv, {_SCORES}, str backend) -> (Tensor out, Tensor lse)")
torch.library.define(
    "fastmim::packed_attention_backward",
    f"(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, {_SCORES}, bool differentiate_bias, str backend)"
    " -> (Tensor grad_qkv, Tensor grad_bias)",
)
torch.library.define("fastmim::attention", f"(Tensor q, Tensor kv, {_SCORES}, str backend) -> (Tensor out, Tensor lse)")
torch.library.define(
    "fastmim::attention_backward",
    f"(Tensor grad_out, Tensor q, Tensor kv, Tensor out, Tensor lse, {_SCORES}, bool differentiate_bias, str backend)"
    " -> (Tensor grad_q, Tensor grad_kv, Tensor grad_bias)",
)


@torch.library.impl("fastmim::packed_attention", ("cpu", "cuda"))
def _packed(qkv: Tensor, *scores: Any) -> tuple[Tensor, Tensor]:
    q, k, v = _dense_rows(qkv).unbind(2)
    return _forward(q, k, v, *scores)


@torch.library.impl("fastmim::attention", ("cpu", "cuda"))
def _apart(q: Tensor, kv: Tensor, *scores: Any) -> tuple[Tensor, Tensor]:
    k, v = _dense_rows(kv).unbind(2)
    return _forward(_dense_rows(q), k, v, *scores)


@torch.library.impl("fastmim::packed_attention_backward", ("cpu", "cuda"))
def _packed_backward(grad_out: Tensor, qkv: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad_bias = _backward(grad_out, _dense_rows(qkv).unbind(2), others, gradient.unbind(2), gradient)
    return gradient, grad_bias


@torch.library.impl("fastmim::attention_backward", ("cpu", "cuda"))
def _apart_backward(grad_out: Tensor, q: Tensor, kv: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_kv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, kv))
    inputs, gradients = (_dense_rows(q), *_dense_rows(kv).unbind(2)), (grad_q, *grad_kv.unbind(2))
    return grad_q, grad_kv, _backward(grad_out, inputs, others, gradients, grad_kv)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_log_count: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """q [B, Nq, H, D], k and v [B, Nk, H, D], dense only along D; bias [B or 1, H, Nq, Nk], its first dimension being 1
    where all images share it."""
    out, lse = _outputs(q, backend)
    bias, key_log_count, key_mask = _dense_scores(bias, key_log_count, key_mask)
    if backend == "triton":
        attention_backends.triton().forward(q, k, v, bias, key_log_count, key_mask, scale, out, lse)
    else:
        inputs = _cpu_inputs(q, k, v, bias, key_log_count, key_mask, scale)
        compiled().packed_attention(_shape(q, k), inputs, _heads(out), lse.data_ptr())
    return out, lse


def _backward(grad_out: Tensor, inputs: Any, others: Any, gradients: Any, largest: Tensor) -> Tensor:
    """Writes the gradients of q, k and v into views of what will be returned; returns that of the bias."""
    (q, k, v), (out, lse, *scores, scale, differentiate_bias, backend) = inputs, others
    bias, key_log_count, key_mask = _dense_scores(*scores)
    grad_out, grad_bias = _dense_rows(grad_out), _bias_gradient(out, bias, differentiate_bias)
    if backend == "triton":
        saved, rest = (q, k, v, out, grad_out, lse), (key_log_count, key_mask, scale)
        attention_backends.triton().backward(*saved, bias, *rest, *gradients)
        if bias is not None and differentiate_bias:
            from fastmim.kernels.attention_bias_gradient import bias_gradient

            bias_gradient(*saved, bias, *rest, grad_bias)
    else:
        compiled().prefer_large_pages(largest.data_ptr(), largest.nbytes)
        compiled().packed_attention_backward(
            _shape(q, k),
            _cpu_inputs(q, k, v, bias, key_log_count, key_mask, scale),
            _heads(grad_out),
            *map(_heads, gradients),
            grad_bias.data_ptr() if differentiate_bias else 0,
        )
    return grad_bias


def _outputs(q: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Not yet written: the result, dense, and what is kept of each row's softmax, fp32. CPU: the log of its sum
    [B, H, Nq], which is infinity where no key is left. Triton, whose backward pass goes by it: [2, B, H, Nq], the
    largest score and 1 / sum of exponentials."""
    batch, queries, heads, _ = q.shape
    kept = (batch, heads, queries)
    return q.new_empty(q.shape), q.new_empty((2, *kept) if backend == "triton" else kept, dtype=torch.float32)


def _bias_gradient(like: Tensor, bias: Tensor | None, wanted: bool) -> Tensor:
    """Not yet written, dense; empty where it is not wanted."""
    return like.new_empty((0,)) if bias is None or not wanted else bias.new_empty(bias.shape)


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _dense_scores(
    bias: Tensor | None, key_log_count: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        None if bias is None else _dense_rows(bias),
        None if key_log_count is None else key_log_count.contiguous(),
        None if key_mask is None else key_mask.contiguous(),
    )


def _shape(q: Tensor, k: Tensor) -> tuple[int, ...]:
    """B, Nq, Nk, H, D."""
    return q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3]


def _heads(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return x.data_ptr(), x.stride()[:3]


def _cpu_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_log_count: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
) -> tuple[Any, ...]:
    """As csrc/bind/packed_attention.cpp takes them."""
    at_bias: tuple[Any, ...] = (0, 0, (0, 0, 0))
    if bias is not None:
        batch, head, query, _ = bias.stride()
        at_bias = bias.data_ptr(), ELEMENTS[bias.dtype], (0 if bias.shape[0] == 1 else batch, head, query)
    counts = 0 if key_log_count is None else key_log_count.data_ptr()
    mask = 0 if key_mask is None else key_mask.data_ptr()
    return _heads(q), _heads(k), _heads(v), ELEMENTS[q.dtype], scale, at_bias, counts, mask


@torch.library.register_fake("fastmim::packed_attention")
def _fake_packed(qkv: Tensor, *scores: Any) -> tuple[Tensor, Tensor]:
    return _outputs(qkv[:, :, 0], scores[-1])


@torch.library.register_fake("fastmim::attention")
def _fake_apart(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _outputs(q, others[-1])


@torch.library.register_fake("fastmim::packed_attention_backward")
def _fake_packed_backward(grad_out: Tensor, qkv: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), _bias_gradient(qkv, others[2], others[-2])


@torch.library.register_fake("fastmim::attention_backward")
def _fake_apart_backward(grad_out: Tensor, q: Tensor, kv: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape), _bias_gradient(q, others[2], others[-2])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, bias, key_log_count, key_mask, ctx.scale, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output, bias, key_log_count, key_mask)


def _differentiate(operator: str, ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    *gradients, grad_bias = getattr(torch.ops.fastmim, operator)(
        grad_out, *ctx.saved_tensors, ctx.scale, ctx.needs_input_grad[-5], ctx.backend
    )
    return *gradients, grad_bias if ctx.needs_input_grad[-5] else None, None, None, None, None


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError("packed_attention: the kernels have no second derivative; use backend='reference' for one")


for _name in ("packed_attention", "attention"):
    torch.library.register_autograd(
        f"fastmim::{_name}",
        lambda ctx, grad_out, _, operator=f"{_name}_backward": _differentiate(operator, ctx, grad_out),
        setup_context=_save,
    )
    torch.library.register_autograd(f"fastmim::{_name}_backward", _refuse)
