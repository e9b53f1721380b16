"""Contrast between the images of a mixed sequence: tokens of one image attract each other, all others repel.

Legend: S mixed sequences, L positions, D width, tau temperature, M [S, L] which image of the group owns a position.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmim.ops.backends import Backends, compiled
from fastmim.ops.masked_patch_loss import ELEMENTS

__all__ = ["homologous_contrastive", "homologous_contrastive_ref"]

NORM_EPS = 1e-8  # a shorter token counts as this long
_backends = Backends(
    "homologous_contrastive",
    cpu="homologous_contrastive",
    triton="fastmim.kernels.homologous_contrastive",
    dtypes={"cpu": ELEMENTS, "triton": ELEMENTS},
)


def homologous_contrastive_ref(tokens: Tensor, segments: Tensor, temperature: float) -> Tensor:
    """What the operation means, in plain PyTorch. Any device, any dtype, differentiable."""
    with torch.autocast(tokens.device.type, enabled=False):
        unit = F.normalize(tokens.to(torch.promote_types(tokens.dtype, torch.float32)), dim=-1, eps=NORM_EPS)
        scores = unit @ unit.transpose(1, 2) / temperature
        itself = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
        same = (segments[:, :, None] == segments[:, None, :]) & ~itself
        partners = same.sum(dim=-1)
        attraction = (scores * same).sum(dim=-1) / partners.clamp(min=1)
        repulsion = scores.masked_fill(itself, float("-inf")).logsumexp(dim=-1)
        return torch.where(partners > 0, repulsion - attraction, 0).sum() / max(segments.numel(), 1)


torch.library.define(
    "fastmim::homologous_contrastive",
    "(Tensor tokens, Tensor segments, float temperature, str backend)"
    " -> (Tensor loss, Tensor unit, Tensor inverse_norm, Tensor slope)",
)
torch.library.define(
    "fastmim::homologous_contrastive_backward",
    "(Tensor grad_loss, Tensor tokens, Tensor unit, Tensor inverse_norm, Tensor slope, str backend) -> Tensor",
)


def _outputs(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Not yet written: the loss; tokens over their length [S, L, D]; 1 / length [S, L]; and the slope [S, L, L] of the
    loss by the product of unit tokens, its two triangles added (first used for the products themselves)."""
    S, L, D = tokens.shape
    scalar = torch.empty((), dtype=torch.float32, device=tokens.device)
    return scalar, scalar.new_empty(S, L, D), scalar.new_empty(S, L), scalar.new_empty(S, L, L)


@torch.library.impl("fastmim::homologous_contrastive", ("cpu", "cuda"))
def _forward(
    tokens: Tensor, segments: Tensor, temperature: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    segments = segments.contiguous()
    loss, unit, inverse_norm, slope = outputs = _outputs(tokens)
    rows = torch.empty((3, *segments.shape), dtype=torch.float32, device=tokens.device)
    run = _backends.triton() if backend == "triton" else _Compiled
    run.normalise(tokens, unit, inverse_norm)
    with torch.autocast(tokens.device.type, enabled=False):
        torch.bmm(unit, unit.transpose(1, 2), out=slope)
    run.contrast(slope, segments, temperature, rows, loss)
    return outputs


@torch.library.impl("fastmim::homologous_contrastive_backward", ("cpu", "cuda"))
def _backward(
    grad_loss: Tensor, tokens: Tensor, unit: Tensor, inverse_norm: Tensor, slope: Tensor, backend: str
) -> Tensor:
    with torch.autocast(tokens.device.type, enabled=False):
        grad_unit = torch.bmm(slope, unit)
    gradient = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    run = _backends.triton() if backend == "triton" else _Compiled
    run.normalise_backward(grad_loss.to(torch.float32), grad_unit, unit, inverse_norm, gradient)
    return gradient


class _Compiled:
    """The C++ kernels, called as the Triton launchers are."""

    @staticmethod
    def normalise(tokens: Tensor, unit: Tensor, inverse_norm: Tensor) -> None:
        compiled().contrastive_normalise(
            tuple(tokens.shape),
            (tokens.data_ptr(), ELEMENTS[tokens.dtype], tokens.stride()),
            unit.data_ptr(),
            inverse_norm.data_ptr(),
        )

    @staticmethod
    def contrast(slope: Tensor, segments: Tensor, temperature: float, rows: Tensor, loss: Tensor) -> None:
        S, L = segments.shape
        compiled().homologous_contrastive(
            S, L, temperature, slope.data_ptr(), segments.data_ptr(), rows.data_ptr(), loss.data_ptr()
        )

    @staticmethod
    def normalise_backward(
        grad_loss: Tensor, grad_unit: Tensor, unit: Tensor, inverse_norm: Tensor, gradient: Tensor
    ) -> None:
        compiled().contrastive_normalise_backward(
            tuple(gradient.shape),
            grad_loss.data_ptr(),
            grad_unit.data_ptr(),
            unit.data_ptr(),
            inverse_norm.data_ptr(),
            (gradient.data_ptr(), ELEMENTS[gradient.dtype], gradient.stride()),
        )


@torch.library.register_fake("fastmim::homologous_contrastive")
def _fake(tokens: Tensor, segments: Tensor, temperature: float, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(tokens)


@torch.library.register_fake("fastmim::homologous_contrastive_backward")
def _fake_backward(grad_loss: Tensor, tokens: Tensor, *others: object) -> Tensor:
    return torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    tokens, _, _, ctx.backend = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(tokens, *kept)


def _differentiate(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.fastmim.homologous_contrastive_backward(grad_loss, *ctx.saved_tensors, ctx.backend)
    return gradient, None, None, None


def _refuse(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("homologous_contrastive: the kernels have no second derivative; use backend='reference' for one")


torch.library.register_autograd("fastmim::homologous_contrastive", _differentiate, setup_context=_save)
torch.library.register_autograd("fastmim::homologous_contrastive_backward", _refuse)


def homologous_contrastive(
    tokens: Tensor, segments: Tensor, group_size: int, *, temperature: float = 0.25, backend: str | None = None
) -> Tensor:
    """Mean over positions l of -1/|P(l)| sum_{p in P(l)} log(exp(cos(l, p)/tau) / sum_{j != l} exp(cos(l, j)/tau)).

    P(l) are the other positions of the same image; a position that has none counts as 0. Only the angles between
    tokens matter, not their lengths. Computed in fp32, under autocast too.

    Args:
        tokens: [S, L, D] of mixed sequences, floating point, any strides, without cls and other prefix tokens.
        segments: [S, L] int64, which image of the group owns a position, as `mixing_map` gives it.
        group_size: G, images in a group, at least 2; with one image there is nothing to tell apart.
        temperature: tau.
        backend: "reference", "cpu" or "triton"; chosen by device when None.

    Returns:
        Scalar, fp32 (fp64 where tokens are).

    Raises:
        ValueError: sizes that do not fit, naming both; a group of one; or a backend asked for by name that cannot run,
            with its reason.

    Source: MixedAE (arXiv 2303.17152), homologous contrastive loss; the form of supervised contrastive learning
    (arXiv 2004.11362) with the mean outside of the logarithm.
    """
    _check(tokens, segments, group_size, temperature)
    chosen = _backends.choose(tokens.device, tokens.dtype, backend)
    if chosen == "reference":
        return homologous_contrastive_ref(tokens, segments, temperature)
    return torch.ops.fastmim.homologous_contrastive(tokens, segments, temperature, chosen)[0]


def _check(tokens: Tensor, segments: Tensor, group_size: int, temperature: float) -> None:
    op = "homologous_contrastive"
    if tokens.dim() != 3 or not tokens.is_floating_point():
        raise ValueError(f"{op}: tokens must be floating point [S, L, D], got {tokens.dtype} {list(tokens.shape)}")
    if segments.shape != tokens.shape[:2] or segments.dtype != torch.int64:
        raise ValueError(
            f"{op}: segments must be int64 {list(tokens.shape[:2])} for tokens {list(tokens.shape)}, got "
            f"{segments.dtype} {list(segments.shape)}"
        )
    if tokens.device != segments.device:
        raise ValueError(f"{op}: tokens are on {tokens.device}, segments on {segments.device}")
    if group_size < 2:
        raise ValueError(f"{op}: group_size is {group_size}; two images at least are needed to tell them apart")
    if tokens.shape[1] < 2 * group_size:
        raise ValueError(
            f"{op}: {tokens.shape[1]} positions for groups of {group_size} images; each needs two, to find itself"
        )
    if not temperature > 0:
        raise ValueError(f"{op}: temperature is {temperature}; it must be above 0")
