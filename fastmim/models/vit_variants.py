"""timm's plain ViTs by name. Facts of timm 1.0.31; the tests compare each name with timm itself."""

import re
from collections.abc import Mapping
from typing import Any

_SIZES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "wee": {"embed_dim": 256, "depth": 14, "num_heads": 4, "mlp_ratio": 5.0},
    "little": {"embed_dim": 320, "depth": 14, "num_heads": 5, "mlp_ratio": 5.6},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "medium": {"embed_dim": 512, "depth": 12, "num_heads": 8},
    "mediumd": {"embed_dim": 512, "depth": 20, "num_heads": 8},
    "betwixt": {"embed_dim": 640, "depth": 12, "num_heads": 10},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
    "giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
    "gigantic": {"embed_dim": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 64 / 13},
}
_DINOV2 = {"img_size": 518, "init_values": 1e-5}
_REGISTERS = {"init_values": 1e-5, "class_token": False, "no_embed_class": True, "global_pool": "avg"}
_MEAN_POOLED = {"class_token": False, "global_pool": "avg", "fc_norm": False}
_MEAN_POOLED_SCALED = {**_MEAN_POOLED, "qkv_bias": False, "init_values": 1e-6}
_PLUS = {"embed_dim": 896, "num_heads": 14, "init_values": 1e-5}

# What a name says beyond its size, patch and image: cls token and learned positions alone when nothing.
_SPECIALITIES: Mapping[str, Mapping[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "vit_tiny_patch16_384": {},
    "vit_wee_patch16_reg1_gap_256": {**_REGISTERS, "reg_tokens": 1},
    "vit_little_patch16_reg1_gap_256": {**_REGISTERS, "reg_tokens": 1},
    "vit_little_patch16_reg4_gap_256": {**_REGISTERS, "reg_tokens": 4},
    "vit_small_patch8_224": {},
    "vit_small_patch14_dinov2": _DINOV2,
    "vit_small_patch14_reg4_dinov2": {**_DINOV2, "reg_tokens": 4, "no_embed_class": True},
    "vit_small_patch16_224": {},
    "vit_small_patch16_36x1_224": {"depth": 36, "init_values": 1e-5},
    "vit_small_patch16_384": {},
    "vit_small_patch32_224": {},
    "vit_small_patch32_384": {},
    "vit_medium_patch16_gap_240": _MEAN_POOLED_SCALED,
    "vit_medium_patch16_gap_256": _MEAN_POOLED_SCALED,
    "vit_medium_patch16_gap_384": _MEAN_POOLED_SCALED,
    "vit_medium_patch16_reg1_gap_256": {**_REGISTERS, "reg_tokens": 1},
    "vit_medium_patch16_reg4_gap_256": {**_REGISTERS, "reg_tokens": 4},
    "vit_mediumd_patch16_reg4_gap_256": {**_REGISTERS, "reg_tokens": 4},
    "vit_mediumd_patch16_reg4_gap_384": {**_REGISTERS, "reg_tokens": 4},
    "vit_betwixt_patch16_gap_256": _MEAN_POOLED_SCALED,
    "vit_betwixt_patch16_reg1_gap_256": {**_REGISTERS, "reg_tokens": 1},
    "vit_betwixt_patch16_reg4_gap_256": {**_REGISTERS, "reg_tokens": 4},
    "vit_betwixt_patch16_reg4_gap_384": {**_REGISTERS, "reg_tokens": 4},
    "vit_base_patch8_224": {},
    "vit_base_patch14_dinov2": _DINOV2,
    "vit_base_patch14_reg4_dinov2": {**_DINOV2, "reg_tokens": 4, "no_embed_class": True},
    "vit_base_patch16_224": {},
    "vit_base_patch16_224_miil": {"img_size": 224, "qkv_bias": False},
    "vit_base_patch16_384": {},
    "vit_base_patch16_gap_224": {**_MEAN_POOLED, "num_heads": 16},
    "vit_base_patch16_plus_240": _PLUS,
    "vit_base_patch16_reg4_gap_256": {**_REGISTERS, "reg_tokens": 4, "init_values": None},
    "vit_base_patch32_224": {},
    "vit_base_patch32_384": {},
    "vit_base_patch32_plus_256": _PLUS,
    "vit_large_patch14_224": {},
    "vit_large_patch14_dinov2": _DINOV2,
    "vit_large_patch14_reg4_dinov2": {**_DINOV2, "reg_tokens": 4, "no_embed_class": True},
    "vit_large_patch16_224": {},
    "vit_large_patch16_384": {},
    "vit_large_patch32_224": {},
    "vit_large_patch32_384": {},
    "vit_huge_patch14_224": {},
    "vit_huge_patch14_gap_224": _MEAN_POOLED,
    "vit_huge_patch16_gap_448": _MEAN_POOLED,
    "vit_giant_patch14_224": {},
    "vit_giant_patch16_gap_224": _MEAN_POOLED,
    "vit_gigantic_patch14_224": {},
}


def _settings(name: str, speciality: Mapping[str, Any]) -> dict[str, Any]:
    parts = re.fullmatch(r"vit_([a-z]+)_patch(\d+)_.*?(\d+)?", name)
    assert parts is not None, name
    size, patch, image = parts.groups()
    sizes = {"patch_size": int(patch)} | ({"img_size": int(image)} if image else {})
    return {**_SIZES[size], **sizes, **speciality}


VIT_VARIANTS = {name: _settings(name, speciality) for name, speciality in _SPECIALITIES.items()}
