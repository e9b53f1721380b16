"""Drop-in layers: attention and blocks of transformers; layers that compute only what is visible, and the conversion of
whole CNNs.

Every masked layer is called as layer(x, tiles): x is tiles [B, K, t, t, C] (B images, K visible cells, t tile side, C
channels), `tiles` a `fastmim.ops.TileIndex`.
"""

from fastmim.layers.accelerate import Acceleration, accelerate
from fastmim.layers.fused_attention import FusedAttention
from fastmim.layers.fused_beit import FusedBeitAttention, FusedBeitBlock
from fastmim.layers.fused_block import FusedBlock
from fastmim.layers.homologous_attention import HomologousAttention, homologous_attention
from fastmim.layers.linear import Linear
from fastmim.layers.mask_token_attention import mask_token_attention
from fastmim.layers.mask_token_decoder import MaskTokenDecoder
from fastmim.layers.masked_batch_norm import MaskedBatchNorm2d
from fastmim.layers.masked_conv import MaskedConv2d
from fastmim.layers.masked_grn import MaskedGRN
from fastmim.layers.masked_norm import MaskedGroupNorm, MaskedLayerNorm2d
from fastmim.layers.masked_pool import MaskedAdaptiveAvgPool2d, MaskedAvgPool2d, MaskedMaxPool2d
from fastmim.layers.masked_squeeze_excite import MaskedSqueezeExcite
from fastmim.layers.patch_mix import ImagePatchMix, PatchMix, mix_images
from fastmim.layers.sparsify import SparseModule, TileOutput, sparsify, stage_names

__all__ = [
    "Acceleration",
    "FusedAttention",
    "FusedBeitAttention",
    "FusedBeitBlock",
    "FusedBlock",
    "HomologousAttention",
    "ImagePatchMix",
    "Linear",
    "MaskTokenDecoder",
    "MaskedAdaptiveAvgPool2d",
    "MaskedAvgPool2d",
    "MaskedBatchNorm2d",
    "MaskedConv2d",
    "MaskedGRN",
    "MaskedGroupNorm",
    "MaskedLayerNorm2d",
    "MaskedMaxPool2d",
    "MaskedSqueezeExcite",
    "PatchMix",
    "SparseModule",
    "TileOutput",
    "accelerate",
    "homologous_attention",
    "mask_token_attention",
    "mix_images",
    "sparsify",
    "stage_names",
]
