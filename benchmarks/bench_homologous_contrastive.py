"""homologous_contrastive against supervised contrastive learning in plain PyTorch."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.runner import Case, Settings, Side, backends_here
from fastmim.ops import homologous_contrastive, mixing_map


def plain_loss(tokens: Tensor, segments: Tensor) -> Tensor:
    """The usual way: a matrix of similarities, a mask of positives, log-softmax without the diagonal."""
    unit = F.normalize(tokens.float(), dim=-1)
    scores = torch.matmul(unit, unit.transpose(1, 2)) / 0.25
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=tokens.device)
    positive = (segments[:, :, None] == segments[:, None, :]) & ~itself
    log_probability = scores - scores.masked_fill(itself, float("-inf")).logsumexp(dim=-1, keepdim=True)
    return -((log_probability * positive).sum(dim=-1) / positive.sum(dim=-1)).mean()


def cases(settings: Settings) -> Iterator[Case]:
    sequences, length, width, size = (2, 49, 64, 4) if settings.quick else (16, 196, 768, 4)
    for dtype in settings.dtypes:

        def inputs(dtype: torch.dtype = dtype) -> tuple[Tensor, Tensor]:
            tokens = torch.randn(sequences, length, width, dtype=dtype, device=settings.device, requires_grad=True)
            rng = torch.randint(0, 2**31, (3,), device=settings.device)
            return tokens, mixing_map(sequences, size, length, rng).segments

        flops = 2 * sequences * length**2 * width
        for backend in backends_here("homologous_contrastive", settings, dtype):
            yield Case(
                op="homologous_contrastive",
                case=f"S{sequences} L{length} D{width} G{size}",
                candidate=Side(backend, partial(homologous_contrastive, group_size=size, backend=backend)),
                baseline=Side("torch eager", plain_loss),
                inputs=inputs,
                dtype=dtype,
                images=sequences * size,
                flops={"forward": flops, "backward": flops, "both": 2 * flops},
            )
