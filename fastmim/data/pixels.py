"""From bytes to the numbers a model sees."""

from collections.abc import Sequence

import torch
from torch import Tensor


def normalise(images: Tensor, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor) -> Tensor:
    """(images / 255 - mean) / std, where the images are.

    Args:
        images: [B, C, H, W] uint8, on any device.
        mean, std: C numbers each, in [0, 1]; tensors already on the device cost no copy (needed under graph capture).

    Returns:
        [B, C, H, W] float32.

    Raises:
        ValueError: images that are not uint8, or as many numbers as there are channels are not given.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"normalise expects uint8 images [B, C, H, W]; got {images.dtype} of shape {list(images.shape)}."
        )
    centre = torch.as_tensor(mean, dtype=torch.float32, device=images.device)
    spread = torch.as_tensor(std, dtype=torch.float32, device=images.device)
    channels = images.shape[1]
    if centre.numel() != channels or spread.numel() != channels:
        raise ValueError(
            f"normalise: the images have {channels} channels, but mean has {centre.numel()} numbers and std "
            f"{spread.numel()}."
        )
    gain = 1 / (255 * spread)
    return images.to(torch.float32).mul_(gain.view(-1, 1, 1)).sub_((centre / spread).view(-1, 1, 1))
