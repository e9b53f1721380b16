"""decoder_input against MAE's repeat, cat, gather, cat and add, with and without the LayerNorm behind it."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.runner import Case, Settings, Side, backends_here
from fastmim.ops import decoder_input

PREFIX, WIDTH = 1, 512


def plain(
    visible: Tensor,
    mask_token: Tensor,
    ids_restore: Tensor,
    positions: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The usual way: mask tokens repeated, everything copied into the order of the patches, cls in front."""
    batch, tokens, width = visible.shape
    missing = ids_restore.shape[1] + PREFIX - tokens
    patches = torch.cat((visible[:, PREFIX:], mask_token.to(visible.dtype).repeat(batch, missing, 1)), dim=1)
    patches = torch.gather(patches, 1, ids_restore.unsqueeze(-1).repeat(1, 1, width))
    x = torch.cat((visible[:, :PREFIX], patches), dim=1) + positions
    # In fp32, as autocast has it.
    return (x, F.layer_norm(x.float(), (width,), weight, bias, 1e-6).to(x.dtype)) if norm else x


def fused(
    visible: Tensor, mask_token: Tensor, ids_restore: Tensor, positions: Tensor, weight: Tensor, bias: Tensor,
    norm: bool, backend: str,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    affine = {"norm_weight": weight, "norm_bias": bias} if norm else {}
    return decoder_input(
        visible, mask_token, ids_restore, positions, num_prefix_tokens=PREFIX, backend=backend, **affine
    )


def cases(settings: Settings) -> Iterator[Case]:
    patches, kept = (16, 4) if settings.quick else (196, 49)
    for dtype in settings.dtypes:
        for batch, norm in ((2, True),) if settings.quick else ((16, False), (16, True), (64, False), (64, True)):

            def inputs(dtype: torch.dtype = dtype, batch: int = batch, norm: bool = norm) -> tuple[Tensor, ...]:
                def normal(*shape: int, dtype: torch.dtype = torch.float32, learned: bool = True) -> Tensor:
                    return torch.randn(shape, device=settings.device, dtype=dtype, requires_grad=learned)

                return (
                    normal(batch, PREFIX + kept, WIDTH, dtype=dtype),
                    normal(WIDTH),
                    torch.rand(batch, patches, device=settings.device).argsort(dim=1),
                    normal(PREFIX + patches, WIDTH, dtype=dtype, learned=False),
                    normal(WIDTH, learned=norm),
                    normal(WIDTH, learned=norm),
                )

            row = batch * WIDTH * dtype.itemsize
            sequence, visible = (PREFIX + patches) * row, (PREFIX + kept) * row
            forward = visible + (1 + norm) * sequence
            backward = (1 + norm) * (sequence + visible)
            for backend in backends_here("decoder_input", settings, dtype):
                yield Case(
                    op="decoder_input",
                    case=f"B{batch} {kept}+{PREFIX} of {patches} tokens, width {WIDTH}{', LayerNorm' if norm else ''}",
                    candidate=Side(backend, partial(fused, norm=norm, backend=backend)),
                    baseline=Side("torch eager", partial(plain, norm=norm)),
                    inputs=inputs,
                    dtype=dtype,
                    images=batch,
                    moved={"forward": forward, "backward": backward, "both": forward + backward},
                )
