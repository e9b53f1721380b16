"""Frozen features of images.

Legend: B batch, N images, C features.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from fastmim.models import Encoder

Pool = Literal["avg", "head"]


@torch.no_grad()
def extract_features(
    encoder: Encoder,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    device: torch.device | str | None = None,
    *,
    pool: Pool = "avg",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> tuple[Tensor, Tensor | None]:
    """Features of all images, with the encoder in evaluation mode (and afterwards as it was).

    Args:
        encoder: on `device` already.
        batches: (images [B, C, H, W] normalised, labels [B] int64 or None), as `eval_batches` gives them.
        device: where to compute; the encoder's own when None.
        pool: "avg": mean over the last feature map, the same for all families. "head": what timm's `forward` hands to
            the classifier, which for a ViT is its class token.
        precision: "bf16" computes under autocast; pooling is fp32 in either case.

    Returns:
        (features [N, C] fp32, labels [N] int64 or None), on the CPU, in the order of `batches`.

    Raises:
        ValueError: no batches, or features that are not finite.
    """
    device = torch.device(device) if device is not None else next(encoder.parameters()).device
    modes = {module: module.training for module in encoder.modules()}
    features, labels = [], []
    encoder.eval()
    try:
        for images, batch_labels in batches:
            images = images.to(device, non_blocking=True)
            with torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext():
                pooled = (
                    encoder.forward_map(images).float().mean(dim=(2, 3))
                    if pool == "avg"
                    else encoder.forward_head(encoder.forward_features(images), pre_logits=True)
                )
            features.append(pooled.float())
            if batch_labels is not None:
                labels.append(batch_labels)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not features:
        raise ValueError("extract_features: there are no images")
    result = torch.cat(features).cpu()
    bad = int((~torch.isfinite(result)).any(dim=1).sum())
    if bad:
        raise ValueError(f"the encoder's features of {bad} of {len(result)} images are not finite (NaN or infinite)")
    return result, torch.cat(labels).cpu() if labels else None
