"""What every patch embedding is given: images and parameters that fit together, the normalisation, the rows' dtype.

Legend: B images, C channels, H W pixels, (p, q) patch, N patches of an image, E width.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fastmim.ops.backends import check_divisible

LAYOUTS = ("nchw", "nhwc")
Statistic = Tensor | Sequence[float] | None


def rows_dtype(weight: Tensor) -> torch.dtype:
    """What the linear map would be given: autocast's dtype where it is on."""
    device = weight.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def scale_shift_of(images: Tensor, mean: Statistic, std: Statistic, dtype: torch.dtype) -> Tensor | None:
    """[2, C] fp32 (fp64 for that dtype): pixels of images [B, C, H, W] times scale plus shift are the normalised ones.
    None: as they are."""
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    if mean is None and unit == 1.0:
        return None
    dtype = torch.promote_types(dtype, torch.float32)
    if isinstance(mean, Tensor) or isinstance(std, Tensor):
        mean, std = (torch.as_tensor(s, device=images.device).detach().double() for s in (mean, std))
        return torch.stack((1 / (unit * std), -mean / std)).to(dtype)
    channels = images.shape[1]
    mean, std = (0.0,) * channels if mean is None else mean, (1.0,) * channels if std is None else std
    values = tuple(1 / (unit * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=images.device)
    return _constant(values, dtype, images.device)


@cache
def _constant(values: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied to the device once, not at every step."""
    return torch.tensor(values, dtype=dtype, device=device)


def check_patch_embed(
    op: str,
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor | None,
    mean: Statistic,
    std: Statistic,
    layout: str,
) -> int:
    """N. Raises ValueError in the caller's terms unless all of it fits together."""
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if images.dim() != 4:
        expected = "[B, C, H, W]" if layout == "nchw" else "[B, H, W, C]"
        raise ValueError(f"{op}: images must be {expected}, got {list(images.shape)}")
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise ValueError(f"{op}: images must be uint8 or floating point, got {images.dtype}")
    channels, height, width = (images.shape[i] for i in ((1, 2, 3) if layout == "nchw" else (3, 1, 2)))
    if weight.dim() != 4 or weight.shape[1] != channels:
        raise ValueError(
            f"{op}: weight must be [E, {channels}, p, q], as {layout} images {list(images.shape)} have "
            f"{channels} channels, got {list(weight.shape)}"
        )
    embedding, _, p, q = weight.shape
    check_divisible(op, height, width, (p, q))
    patches = (height // p) * (width // q)
    if bias is not None and bias.shape != (embedding,):
        raise ValueError(f"{op}: bias must be [{embedding}], as weight has rows, got {list(bias.shape)}")
    if positions is not None and positions.shape != (patches, embedding):
        raise ValueError(
            f"{op}: positions must be [{patches}, {embedding}] for {patches} patches of {p}x{q} pixels, "
            f"got {list(positions.shape)}"
        )
    if (mean is None) != (std is None):
        raise ValueError(f"{op}: mean and std go together; {'mean' if mean is None else 'std'} is missing")
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and (
            values.shape != (channels,) if isinstance(values, Tensor) else len(values) != channels
        ):
            got = list(values.shape) if isinstance(values, Tensor) else len(values)
            raise ValueError(f"{op}: {name} must hold {channels} numbers, one a channel, got {got}")
    for name, tensor in (("weight", weight), ("bias", bias), ("positions", positions)):
        if tensor is not None and tensor.device != images.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, images on {images.device}")
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    return patches
