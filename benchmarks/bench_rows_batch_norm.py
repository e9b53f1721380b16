"""rows_batch_norm against torch's batch norm, sum and ReLU, at the ends of ResNet-50's residual blocks."""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.runner import Case, Settings, Side, backends_here
from fastmim.ops import rows_batch_norm

STAGES = [(8, 256), (4, 512), (2, 1024), (1, 2048)]  # tile side, channels
VISIBLE = 20  # of 49 cells


def fused(x: Tensor, shortcut: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    return rows_batch_norm(x, None, None, weight, bias, True, residual=shortcut, relu=True, backend=backend)


def one_by_one(x: Tensor, shortcut: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = x.reshape(1, -1, 1, x.shape[-1]).movedim(-1, 1)  # [1, C, M, 1], which torch takes as channels last
    normal = F.batch_norm(rows, None, None, weight, bias, training=True).movedim(1, -1).reshape(x.shape)
    return F.relu(normal + shortcut)


def cases(settings: Settings) -> Iterator[Case]:
    batch = 2 if settings.quick else 8
    for side, channels in STAGES[-1:] if settings.quick else STAGES:
        for dtype in settings.dtypes:

            def inputs(side: int = side, channels: int = channels, dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
                shape = (batch, VISIBLE, side, side, channels)
                maps = (torch.randn(shape, device=settings.device).to(dtype) for _ in range(2))
                parameters = (torch.rand(channels, device=settings.device) + 0.5 for _ in range(2))
                return tuple(tensor.requires_grad_() for tensor in (*maps, *parameters))

            size = batch * VISIBLE * side**2 * channels * dtype.itemsize
            for backend in backends_here("rows_batch_norm", settings, dtype):
                yield Case(
                    op="rows_batch_norm",
                    case=f"norm + shortcut, relu B{batch} {channels}x{side}x{side} tiles",
                    candidate=Side(backend, partial(fused, backend=backend)),
                    baseline=Side("torch, one by one", one_by_one),
                    inputs=inputs,
                    dtype=dtype,
                    tolerance=5e-3 if dtype == torch.float32 else 5e-2,  # a relu's gradient jumps where it meets zero
                    images=batch,
                    # forward reads x twice and writes; backward reads gradient, x, result, then two of them again
                    moved={"forward": 4 * size, "backward": 7 * size, "both": 11 * size},
                )
