"""The rule for every kernel: error(kernel) <= 2 x error(torch in the same precision), both against fp64."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.ops.support.backend_params import Backend


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New uninitialised tensors are full of NaN (or the largest integer), so an output that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _run(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    wrt: Sequence[int],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """Outputs, then gradients of <outputs, fixed random cotangents> with respect to the arguments `wrt`."""
    args = list(args)
    for i, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().to(dtype) if dtype is not None else value.detach()
            args[i] = value.requires_grad_(i in wrt)
    out = function(*args, **kwargs)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    grads: Sequence[Tensor] = []
    if wrt:
        generator = torch.Generator().manual_seed(0)
        cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
        grads = torch.autograd.grad(outputs, [args[i] for i in wrt], cotangents)
    return [t.detach().double().cpu() for t in [*outputs, *grads]]


def assert_as_good_as_torch(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    *args: Any,
    backend: Backend,
    wrt: Sequence[int] = (0,),
    slack: float = 2.0,
    **kwargs: Any,
) -> None:
    """Runs `op` on `backend`, the plain reference in the same precision and the reference in fp64; compares outputs
    and the gradients of the arguments at positions `wrt`.

    The floor, two units in the last place of the largest value, is for cases in which torch happens to be exact.
    """
    moved = [_keep_layout(value, backend.device) if isinstance(value, Tensor) else value for value in args]
    dtype = next(v.dtype for v in moved if isinstance(v, Tensor) and v.is_floating_point())
    with poisoned_memory():
        ours = _run(op, moved, {**kwargs, "backend": backend}, wrt, None)
    plain = _run(reference, moved, kwargs, wrt, None)
    exact = _run(reference, moved, kwargs, wrt, torch.float64)
    names = [f"output {i}" for i in range(len(exact) - len(wrt))] + [f"gradient of argument {i}" for i in wrt]
    for name, a, b, truth in zip(names, ours, plain, exact, strict=True):
        assert a.shape == truth.shape, f"{name}: shape {list(a.shape)}, expected {list(truth.shape)}"
        if truth.numel() == 0:
            continue
        assert torch.isfinite(a).all() or not torch.isfinite(truth).all(), f"{name}: not finite (an unwritten element?)"
        error, allowed = (a - truth).abs().max(), slack * (b - truth).abs().max()
        floor = 2 * torch.finfo(dtype).eps * truth.abs().max()
        assert error <= max(allowed, floor), (
            f"{name} on {backend.label}: error {error:.3e}, torch in {dtype} has {(b - truth).abs().max():.3e}, "
            f"floor {floor:.3e}"
        )


def _keep_layout(value: Tensor, device: str) -> Tensor:
    """Moves to `device` with the same strides (Tensor.to would make an offset slice dense)."""
    if value.device.type == device:
        return value
    span = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
    flat = torch.as_strided(value, (span,), (1,)).to(device)
    return torch.as_strided(flat, value.shape, value.stride())
