"""Attention of each patch to the patches that fit it best: the homologous attention of MixedAE.

Legend: B batch, N tokens, P of them a prefix (cls), H heads, D head width, W = ceil(N / 32) words of bits.
"""

from typing import Any

import torch
from torch import Tensor

from fastmim.ops.attention_operators import ELEMENTS, WIDTHS
from fastmim.ops.backends import Backends, compiled

__all__ = ["homologous_chance", "topk_attention", "topk_attention_ref"]

_backends = Backends(
    "topk_attention",
    cpu="topk_attention",
    triton="fastmim.kernels.topk_attention",
    dtypes={"cpu": ELEMENTS, "triton": ELEMENTS},
)
MOST_TOKENS_ON_CHIP = 1024  # whose scores the Triton kernel holds in registers


def topk_attention_ref(
    qkv: Tensor, k: int, num_prefix_tokens: int = 1, segments: Tensor | None = None, scale: float | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """What the operation means, in plain PyTorch. Any device, any dtype, differentiable."""
    dtype, prefix = torch.promote_types(qkv.dtype, torch.float32), num_prefix_tokens
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(qkv.device.type, enabled=False):
        query, key, value = qkv.to(dtype).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", query * scale, key)
        kept = _largest(scores.detach()[:, :, prefix:, prefix:], k)
        weights = scores.masked_fill(torch.nn.functional.pad(~kept, (prefix, 0, prefix, 0)), float("-inf")).softmax(-1)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, value).to(qkv.dtype).contiguous()
    if segments is None:
        return out
    others = kept & ~torch.eye(kept.shape[-1], dtype=torch.bool, device=kept.device)
    homologous = others & (segments[:, :, None] == segments[:, None, :])[:, None]
    return out, _share(homologous.sum(), others.sum())


def _largest(scores: Tensor, k: int) -> Tensor:
    """bool: the k largest of each row, of equal ones the first."""
    threshold = scores.topk(k, dim=-1).values[..., -1:]
    above, tied = ~(scores <= threshold), scores == threshold  # what is not a number is above all: it is kept and shows
    wanted = k - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= wanted))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part.to(torch.float32) / whole.clamp(min=1).to(torch.float32)


def homologous_chance(num_patches: int, group_size: int) -> float:
    """The share of homologous keys among random ones, itself excluded, where each of `group_size` images shows
    num_patches / group_size patches."""
    return (num_patches / group_size - 1) / (num_patches - 1)


torch.library.define(
    "fastmim::topk_attention",
    "(Tensor qkv, int k, int num_prefix_tokens, Tensor? segments, float scale, str backend)"
    " -> (Tensor out, Tensor lse, Tensor chosen, Tensor tally)",
)
torch.library.define(
    "fastmim::topk_attention_backward",
    "(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor chosen, int k, int num_prefix_tokens, float scale,"
    " str backend) -> Tensor",
)


def _outputs(qkv: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Not yet written: the result [B, N, H, D]; the log of each row's sum of exponentials [B, H, N]; which keys each
    query chose [B, H, N, W], bit j of word i for key 32 * i + j; and with segments, how many chosen keys are of the
    query's image and how many there are, without itself and the prefix [B, H, N, 2], else empty."""
    batch, tokens, _, heads, width = qkv.shape
    rows = (batch, heads, tokens)
    return (
        qkv.new_empty((batch, tokens, heads, width)),
        qkv.new_empty(rows, dtype=torch.float32),
        qkv.new_empty((*rows, (tokens + 31) // 32), dtype=torch.int32),
        qkv.new_empty((0,) if segments is None else (*rows, 2), dtype=torch.int32),
    )


@torch.library.impl("fastmim::topk_attention", ("cpu", "cuda"))
def _forward(
    qkv: Tensor, k: int, num_prefix_tokens: int, segments: Tensor | None, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    qkv = _dense_rows(qkv)
    segments = None if segments is None else segments.contiguous()
    out, lse, chosen, tally = outputs = _outputs(qkv, segments)
    if backend == "triton":
        _backends.triton().forward(qkv, k, num_prefix_tokens, segments, scale, *outputs)
    else:
        at_segments, at_tally = (0, 0) if segments is None else (segments.data_ptr(), tally.data_ptr())
        compiled().topk_attention(
            _shape(qkv, num_prefix_tokens, k), _cpu_inputs(qkv, scale), at_segments, _heads(out),
            lse.data_ptr(), chosen.data_ptr(), at_tally,
        )  # fmt: skip
    return outputs


@torch.library.impl("fastmim::topk_attention_backward", ("cpu", "cuda"))
def _backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    chosen: Tensor,
    k: int,
    num_prefix_tokens: int,
    scale: float,
    backend: str,
) -> Tensor:
    qkv, grad_out, gradient = _dense_rows(qkv), _dense_rows(grad_out), qkv.new_empty(qkv.shape)
    if backend == "triton":
        _backends.triton().backward(qkv, out, grad_out, lse, chosen, scale, gradient)
    else:
        compiled().prefer_large_pages(gradient.data_ptr(), gradient.nbytes)
        compiled().topk_attention_backward(
            _shape(qkv, num_prefix_tokens, k), _cpu_inputs(qkv, scale), chosen.data_ptr(), _heads(grad_out),
            *map(_heads, gradient.unbind(2)),
        )  # fmt: skip
    return gradient


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return x.data_ptr(), x.stride()[:3]


def _shape(qkv: Tensor, num_prefix_tokens: int, k: int) -> tuple[int, ...]:
    """B, N, H, D, P, k."""
    batch, tokens, _, heads, width = qkv.shape
    return batch, tokens, heads, width, num_prefix_tokens, k


def _cpu_inputs(qkv: Tensor, scale: float) -> tuple[Any, ...]:
    """As csrc/bind/topk_attention.cpp takes them."""
    return *map(_heads, qkv.unbind(2)), ELEMENTS[qkv.dtype], scale


@torch.library.register_fake("fastmim::topk_attention")
def _fake(
    qkv: Tensor, k: int, num_prefix_tokens: int, segments: Tensor | None, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(qkv, segments)


@torch.library.register_fake("fastmim::topk_attention_backward")
def _fake_backward(grad_out: Tensor, qkv: Tensor, *others: object) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, k, num_prefix_tokens, _, scale, backend = inputs
    ctx.options = (k, num_prefix_tokens, scale, backend)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(qkv, *output[:3])


def _differentiate(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.fastmim.topk_attention_backward(grad_out, *ctx.saved_tensors, *ctx.options)
    return gradient, None, None, None, None, None


def _refuse(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("topk_attention: the kernels have no second derivative; use backend='reference' for one")


torch.library.register_autograd("fastmim::topk_attention", _differentiate, setup_context=_save)
torch.library.register_autograd("fastmim::topk_attention_backward", _refuse)


def topk_attention(
    qkv: Tensor,
    k: int,
    num_prefix_tokens: int = 1,
    segments: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which each query keeps the k keys of largest score, per head; softmax over those alone.

    Of equal scores the keys that come first are kept, so there are always exactly k. Keys of the prefix (cls) are kept
    by every query and not counted; queries of the prefix attend everywhere. The choice is a constant: gradients flow
    through the kept scores only. k = N - P is plain attention.

    Args:
        qkv: [B, N, 3, H, D], a view of what a linear layer of 3 * H * D outputs gives; fp32, bf16 or fp16 (fp64 on the
            reference). Any strides; the last dimension is best dense. Under autocast fp32 is cast to autocast's dtype.
        k: patches that each patch attends to, 1 to N - P.
        num_prefix_tokens: P, tokens before the patches.
        segments: [B, N - P] integers, which image each patch comes from; when given, how well the choice finds a
            patch's own image is measured too.
        scale: of the scores; D ** -0.5 when None.
        backend: "reference", "cpu" or "triton"; chosen by device when None. The kernels take D = 32, 40, 48, 64, 80,
            96 and 128, Triton's at most 1,024 tokens; anything else is left to the reference.

    Returns:
        [B, N, H, D] in the dtype of qkv, dense, so that `.flatten(2)` is a view. With segments also a scalar, fp32:
        among all keys that patches chose (the prefix and themselves left out, all heads together), the share that is
        of their own image. `homologous_chance` says what random choices would give.

    Raises:
        ValueError: sizes or dtypes that do not fit, naming both; or a backend asked for by name that cannot run, with
            its reason.

    Source: MixedAE (arXiv 2303.17152, section 3.2). Its text leaves open what happens to cls and to equal scores; the
    rules above are this package's.
    """
    _check(qkv, k, num_prefix_tokens, segments)
    if qkv.dtype == torch.float32 and torch.is_autocast_enabled(qkv.device.type):
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
    width = qkv.shape[-1]
    scale = width**-0.5 if scale is None else float(scale)
    unfit = "" if width in WIDTHS else f"the kernels take head widths {', '.join(map(str, WIDTHS))}, this is {width}"
    if qkv.shape[1] > MOST_TOKENS_ON_CHIP and (backend == "triton" or qkv.device.type != "cpu"):
        unfit = f"the Triton kernel takes at most {MOST_TOKENS_ON_CHIP} tokens, these are {qkv.shape[1]}"
    chosen = _backends.choose(qkv.device, qkv.dtype, backend, unfit)
    if chosen == "reference":
        return topk_attention_ref(qkv, k, num_prefix_tokens, segments, scale)
    if segments is not None:
        segments = segments.to(torch.int32)
    out, _, _, tally = torch.ops.fastmim.topk_attention(qkv, k, num_prefix_tokens, segments, scale, chosen)
    if segments is None:
        return out
    homologous, others = tally.sum(dim=(0, 1, 2)).unbind()
    return out, _share(homologous, others)


def _check(qkv: Tensor, k: int, num_prefix_tokens: int, segments: Tensor | None) -> None:
    """Raises ValueError in the caller's terms."""
    op = "topk_attention"
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv must be [B, N, 3, H, D], got {list(qkv.shape)}")
    if not qkv.is_floating_point():
        raise ValueError(f"{op}: qkv must be floating point, got {qkv.dtype}")
    batch, tokens = qkv.shape[:2]
    if not 0 <= num_prefix_tokens < tokens:
        raise ValueError(f"{op}: num_prefix_tokens is {num_prefix_tokens}, expected 0 to {tokens - 1} (N = {tokens})")
    patches = tokens - num_prefix_tokens
    if not 1 <= k <= patches:
        raise ValueError(f"{op}: k is {k}, expected 1 to {patches} (patches among {tokens} tokens)")
    if segments is None:
        return
    if segments.shape != (batch, patches):
        raise ValueError(f"{op}: segments must be [{batch}, {patches}] (batch, patches), got {list(segments.shape)}")
    if segments.is_floating_point() or segments.dtype == torch.bool:
        raise ValueError(f"{op}: segments must be integers (which image a patch comes from), got {segments.dtype}")
    if segments.device != qkv.device:
        raise ValueError(f"{op}: segments are on {segments.device}, qkv on {qkv.device}; they must share a device")
