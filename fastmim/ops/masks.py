"""Between cells and pixels: masks at another resolution, images as rows of patches. Plain PyTorch.

Legend: B batch, C channels, H W image, (p, q) patch, (gh, gw) grid = (H/p, W/q), N = gh * gw patches, row-major.
"""

from torch import Tensor

PatchSize = int | tuple[int, int]

__all__ = ["patch_pair", "patchify", "unpatchify", "upsample_mask"]


def patch_pair(patch_size: PatchSize) -> tuple[int, int]:
    """(height, width) of a patch given as one side or as a pair."""
    p, q = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if p < 1 or q < 1:
        raise ValueError(f"a patch must be at least 1 x 1 pixels, got {p} x {q}")
    return p, q


def upsample_mask(mask: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """A mask of cells, nearest-repeated to a finer resolution.

    Args:
        mask: [B, N] bool, True = removed, N = gh * gw.
        grid: (gh, gw), the cells' grid.
        size: (H, W), each divisible by the grid: pixels, or the tokens of a feature map.

    Returns:
        [B, H, W] bool.
    """
    (gh, gw), (height, width) = grid, size
    if mask.dim() != 2 or mask.shape[1] != gh * gw:
        raise ValueError(f"upsample_mask: a {gh} x {gw} grid has {gh * gw} cells, mask is {list(mask.shape)}")
    if height % gh or width % gw:
        raise ValueError(f"upsample_mask: size {height} x {width} is not a multiple of the {gh} x {gw} grid")
    cells = mask.reshape(-1, gh, 1, gw, 1)
    return cells.expand(-1, gh, height // gh, gw, width // gw).reshape(-1, height, width)


def patchify(images: Tensor, patch_size: PatchSize) -> Tensor:
    """Images as rows of flattened patches, each in MAE's (p, q, c) order: channel last.

    Args:
        images: [B, C, H, W], any dtype and strides; H and W divisible by the patch.
        patch_size: side of a square patch or (p, q), in pixels.

    Returns:
        [B, N, p * q * C].

    Source: MAE (arXiv 2111.06377), section 3; rectangular patches and grids added.
    """
    p, q = patch_pair(patch_size)
    if images.dim() != 4 or images.shape[2] % p or images.shape[3] % q:
        raise ValueError(
            f"patchify: images must be [B, C, H, W], H and W divisible by the {p} x {q} patch, got {list(images.shape)}"
        )
    batch, channels, height, width = images.shape
    cells = images.reshape(batch, channels, height // p, p, width // q, q)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, (height // p) * (width // q), p * q * channels)


def unpatchify(patches: Tensor, patch_size: PatchSize, size: tuple[int, int], channels: int) -> Tensor:
    """The inverse of `patchify`.

    Args:
        patches: [B, N, p * q * C] in (p, q, c) order.
        patch_size: side of a square patch or (p, q), in pixels.
        size: (H, W) of the images.
        channels: C.

    Returns:
        [B, C, H, W].
    """
    p, q = patch_pair(patch_size)
    gh, gw = size[0] // p, size[1] // q
    if size != (gh * p, gw * q) or patches.dim() != 3 or patches.shape[1:] != (gh * gw, p * q * channels):
        raise ValueError(
            f"unpatchify: {channels} x {size[0]} x {size[1]} images of {p} x {q} patches are rows "
            f"[B, {gh * gw}, {p * q * channels}], got {list(patches.shape)}"
        )
    cells = patches.reshape(patches.shape[0], gh, gw, p, q, channels)
    return cells.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], channels, size[0], size[1])
