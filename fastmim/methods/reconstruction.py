"""Pictures of methods that drop cells and predict the pixels of a patch."""

import torch
from torch import Tensor

from fastmim.methods.base import Pictures
from fastmim.methods.masking import removed_pixels
from fastmim.ops import patchify, unpatchify


def patch_pictures(
    original: Tensor, prediction: Tensor, mask: Tensor, patch_size: tuple[int, int], norm_pix: bool
) -> Pictures:
    """Predicted patches in the removed places of the image.

    Args:
        original: [B, C, H, W].
        prediction: [B, N, p*q*C] or [B, C, H, W], without gradient.
        mask: bool [B, N], True = removed.
        norm_pix: the prediction is normalised by mean and variance of its patch.
    """
    size = (original.shape[2], original.shape[3])
    patches = (prediction if prediction.dim() == 3 else patchify(prediction, patch_size)).float()
    if norm_pix:
        variance, mean = torch.var_mean(patchify(original, patch_size).float(), dim=-1, keepdim=True)
        patches = patches * (variance + 1e-6).sqrt() + mean
    image = unpatchify(patches, patch_size, size, original.shape[1]).to(original.dtype)
    removed = removed_pixels(mask, (size[0] // patch_size[0], size[1] // patch_size[1]), size)
    return Pictures(original, original.masked_fill(removed, 0.0), image.where(removed, original))
