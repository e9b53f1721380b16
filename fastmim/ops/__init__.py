"""Functions on tensors, each with a readable reference beside its kernels."""

from fastmim.ops.frequency_loss import frequency_loss
from fastmim.ops.masked_patch_loss import masked_patch_loss
from fastmim.ops.masks import patchify, unpatchify, upsample_mask
from fastmim.ops.random_mask import Masks, random_mask

__all__ = ["Masks", "frequency_loss", "masked_patch_loss", "patchify", "random_mask", "unpatchify", "upsample_mask"]
