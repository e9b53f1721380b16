"""Functions on tensors, each with a readable reference beside its kernels."""

from fastmim.ops.decoder_input import decoder_input
from fastmim.ops.frequency_loss import frequency_loss
from fastmim.ops.homologous_contrastive import homologous_contrastive
from fastmim.ops.linear import linear
from fastmim.ops.masked_conv import masked_conv2d
from fastmim.ops.masked_patch_loss import masked_patch_loss
from fastmim.ops.masked_pool import masked_avg_pool2d, masked_max_pool2d
from fastmim.ops.masks import patchify, unpatchify, upsample_mask
from fastmim.ops.mixing_map import MixingMap, mixing_map
from fastmim.ops.packed_attention import attention, packed_attention
from fastmim.ops.patch_mix import patch_mix
from fastmim.ops.random_mask import Masks, random_mask
from fastmim.ops.rows_batch_norm import rows_batch_norm
from fastmim.ops.tile_index import TileIndex
from fastmim.ops.tiles import gather_tiles, scatter_tiles
from fastmim.ops.topk_attention import topk_attention
from fastmim.ops.unmix import unmix
from fastmim.ops.visible_patch_embed import visible_patch_embed

__all__ = [
    "Masks",
    "MixingMap",
    "TileIndex",
    "attention",
    "decoder_input",
    "frequency_loss",
    "gather_tiles",
    "homologous_contrastive",
    "linear",
    "masked_avg_pool2d",
    "masked_conv2d",
    "masked_max_pool2d",
    "masked_patch_loss",
    "mixing_map",
    "packed_attention",
    "patch_mix",
    "patchify",
    "random_mask",
    "rows_batch_norm",
    "scatter_tiles",
    "topk_attention",
    "unmix",
    "unpatchify",
    "upsample_mask",
    "visible_patch_embed",
]
