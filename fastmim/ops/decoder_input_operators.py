"""The operators behind fastmim.ops.decoder_input, and their gradients.

Legend: B batch, in groups of G with the same visible tokens, P prefix tokens, K visible patches, N all patches,
E width.
"""

from typing import Any

import torch
from torch import Tensor

from fastmim.ops.backends import Backends, compiled
from fastmim.ops.masked_patch_loss import ELEMENTS

__all__ = ["decoder_input_backends"]

decoder_input_backends = Backends(
    "decoder_input",
    cpu="decoder_input",
    triton="fastmim.kernels.decoder_input",
    dtypes={"cpu": ELEMENTS, "triton": ELEMENTS},
)
torch.library.define(
    "fastmim::decoder_input",
    "(Tensor visible, Tensor mask_token, Tensor ids_restore, Tensor? positions, Tensor? norm_weight, Tensor? norm_bias,"
    " int prefix, int group, float eps, ScalarType dtype, ScalarType normed_dtype, str backend)"
    " -> (Tensor sequence, Tensor normed)",
)
torch.library.define(
    "fastmim::decoder_input_backward",
    "(Tensor? grad_sequence, Tensor? grad_normed, Tensor? visible, Tensor mask_token, Tensor ids_restore,"
    " Tensor? positions, Tensor? norm_weight, int prefix, int group, float eps, int kept, ScalarType dtype,"
    " bool wants_positions, str backend)"
    " -> (Tensor visible, Tensor mask_token, Tensor positions, Tensor norm_weight, Tensor norm_bias)",
)


@torch.library.register_fake("fastmim::decoder_input")
def _outputs(
    visible: Tensor,
    mask_token: Tensor,
    ids_restore: Tensor,
    positions: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    prefix: int,
    group: int,
    eps: float,
    dtype: torch.dtype,
    normed_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Not yet written: the sequence [B, P + N, E] and its LayerNorm (empty without norm_weight)."""
    shape = (ids_restore.shape[0], prefix + ids_restore.shape[1], visible.shape[2])
    normed = visible.new_empty((0,) if norm_weight is None else shape, dtype=normed_dtype)
    return visible.new_empty(shape, dtype=dtype), normed


@torch.library.register_fake("fastmim::decoder_input_backward")
def _gradients(
    grad_sequence: Tensor | None,
    grad_normed: Tensor | None,
    visible: Tensor | None,
    mask_token: Tensor,
    ids_restore: Tensor,
    positions: Tensor | None,
    norm_weight: Tensor | None,
    prefix: int,
    group: int,
    eps: float,
    kept: int,
    dtype: torch.dtype,
    wants_positions: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """Not yet written. Of visible [B / G, P + K, E] in its dtype, the others fp32; empty where nothing is wanted. Only
    the LayerNorm reads visible tokens."""
    (batch, patches), width = ids_restore.shape, mask_token.shape[-1]
    affine = (0,) if norm_weight is None else (width,)
    shapes = (mask_token.shape, (prefix + patches, width) if wants_positions else (0,), affine, affine)
    return (
        mask_token.new_empty((batch // group, prefix + kept, width), dtype=dtype),
        *(mask_token.new_empty(shape, dtype=torch.float32) for shape in shapes),
    )


@torch.library.impl("fastmim::decoder_input", ("cpu", "cuda"))
def _forward(
    visible: Tensor,
    mask_token: Tensor,
    ids_restore: Tensor,
    positions: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    prefix: int,
    group: int,
    eps: float,
    dtype: torch.dtype,
    normed_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    inputs = (visible, mask_token, ids_restore, positions, norm_weight, norm_bias)
    sequence, normed = outputs = _outputs(*inputs, prefix, group, eps, dtype, normed_dtype, backend)
    if backend == "triton":
        decoder_input_backends.triton().forward(*_dense(*inputs), prefix, group, eps, sequence, normed)
    else:
        visible, mask_token, ids_restore, positions, norm_weight, norm_bias = _dense(*inputs)
        _, tokens, width = visible.shape
        for tensor in outputs:
            compiled().prefer_large_pages(tensor.data_ptr(), tensor.nbytes)
        compiled().decoder_input(
            (ids_restore.shape[0], prefix, tokens - prefix, ids_restore.shape[1], width, group),
            ids_restore.data_ptr(),
            _strided(visible),
            _parameters(mask_token, positions, norm_weight, norm_bias, eps),
            _rows(sequence),
            _rows(normed),
        )
    return outputs


@torch.library.impl("fastmim::decoder_input_backward", ("cpu", "cuda"))
def _backward(
    grad_sequence: Tensor | None,
    grad_normed: Tensor | None,
    visible: Tensor | None,
    mask_token: Tensor,
    ids_restore: Tensor,
    positions: Tensor | None,
    norm_weight: Tensor | None,
    prefix: int,
    group: int,
    eps: float,
    kept: int,
    dtype: torch.dtype,
    wants_positions: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    inputs = (visible, mask_token, ids_restore, positions, norm_weight)
    gradients = _gradients(
        grad_sequence, grad_normed, *inputs, prefix, group, eps, kept, dtype, wants_positions, backend
    )
    grads = tuple(None if grad is None else grad.contiguous() for grad in (grad_sequence, grad_normed))
    if backend == "triton":
        decoder_input_backends.triton().backward(*grads, *_dense(*inputs), prefix, group, eps, *gradients)
    else:
        visible, mask_token, ids_restore, positions, norm_weight = _dense(*inputs)
        compiled().decoder_input_backward(
            (ids_restore.shape[0], prefix, kept, ids_restore.shape[1], mask_token.shape[-1], group),
            ids_restore.data_ptr(),
            (0, ELEMENTS[dtype], (0, 0)) if visible is None else _strided(visible),
            _parameters(mask_token, positions, norm_weight, None, eps),
            *(_rows(grad) for grad in grads),
            *(gradient.data_ptr() if gradient.numel() else 0 for gradient in gradients),
        )
    return gradients


def _dense(visible: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    """As the kernels take them: channels side by side, all but `visible` contiguous."""
    if visible is not None and visible.stride(-1) != 1:
        visible = visible.contiguous()
    return visible, *(None if tensor is None else tensor.contiguous() for tensor in others)


def _strided(visible: Tensor) -> tuple[int, int, tuple[int, int]]:
    return visible.data_ptr(), ELEMENTS[visible.dtype], (visible.stride(0), visible.stride(1))


def _rows(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), ELEMENTS[tensor.dtype])


def _parameters(
    mask_token: Tensor, positions: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float
) -> tuple[Any, ...]:
    places = (0 if tensor is None else tensor.data_ptr() for tensor in (positions, norm_weight, norm_bias))
    return mask_token.data_ptr(), mask_token.dim() == 2, *places, eps


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    visible, mask_token, ids_restore, positions, norm_weight, norm_bias, prefix, group, eps, _, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    if norm_weight is None:
        ctx.mark_non_differentiable(output[1])
    ctx.has = positions is not None, norm_weight is not None, norm_bias is not None
    ctx.options = prefix, group, eps, visible.shape[1] - prefix, visible.dtype
    ctx.save_for_backward(None if norm_weight is None else visible, mask_token, ids_restore, positions, norm_weight)


def _differentiate(ctx: Any, grad_sequence: Tensor | None, grad_normed: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_sequence is None and grad_normed is None:
        return (None,) * 12
    has_positions, has_weight, has_bias = ctx.has
    wants_positions = has_positions and ctx.needs_input_grad[3]
    visible, mask_token, positions, weight, bias = torch.ops.fastmim.decoder_input_backward(
        grad_sequence, grad_normed, *ctx.saved_tensors, *ctx.options, wants_positions, ctx.backend
    )
    affine = weight if has_weight else None, bias if has_bias else None
    return visible, mask_token, None, positions if wants_positions else None, *affine, *[None] * 6


def _refuse(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("decoder_input: the kernels have no second derivative; use backend='reference' for one")


torch.library.register_autograd("fastmim::decoder_input", _differentiate, setup_context=_save)
torch.library.register_autograd("fastmim::decoder_input_backward", _refuse)
