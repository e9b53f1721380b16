"""Functions on tensors, each with a readable reference beside its kernels."""

from fastmim.ops.frequency_loss import frequency_loss
from fastmim.ops.masked_patch_loss import masked_patch_loss
from fastmim.ops.masks import patchify, unpatchify, upsample_mask

__all__ = ["frequency_loss", "masked_patch_loss", "patchify", "unpatchify", "upsample_mask"]
