"""Triton kernel for the pixels of chosen patches as rows of a matrix; one program a row.

Legend: B images, C channels, P x Q pixels a patch, V = C * P * Q values, S sequences of K rows.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastmim.kernels.ahead_of_time import Config


@triton.jit
def _rows(
    images,  # *[B, C, H, W], strided; uint8 or floating point
    image_ids,  # *[S, K] int64; only with IMAGES
    patch_ids,  # *[S, K] int64; only with PATCHES
    scale_shift,  # *[2, C] fp32; only with SCALE
    rows,  # *[S, K, V] contiguous
    stride_b, stride_c, stride_h, stride_w,  # of images
    K, grid_columns,
    C: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    IMAGES: tl.constexpr,  # a row names its image, else sequence s is image s
    PATCHES: tl.constexpr,  # a row names its patch, else row k is patch k
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,  # values handled at a time
):  # fmt: skip
    """Reads V pixels once, writes V values in the order (channel, row, column)."""
    index = tl.program_id(0).to(tl.int64)  # s * K + k; int64, because S * K * V may exceed 2**31
    image = tl.load(image_ids + index) if IMAGES else index // K
    patch = tl.load(patch_ids + index) if PATCHES else index % K
    images += image * stride_b + patch // grid_columns * P * stride_h + patch % grid_columns * Q * stride_w
    for start in range(0, C * P * Q, BLOCK):
        value = start + tl.arange(0, BLOCK)
        inside = value < C * P * Q
        c, y, x = value // (P * Q), value // Q % P, value % Q
        at = c.to(tl.int64) * stride_c + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
        pixel = tl.load(images + at, mask=inside, other=0).to(tl.float32)
        if SCALE:
            scale = tl.load(scale_shift + c, mask=inside, other=0.0)
            pixel = pixel * scale + tl.load(scale_shift + C + c, mask=inside, other=0.0)
        tl.store(rows + index * (C * P * Q) + value, pixel.to(rows.dtype.element_ty), mask=inside)


def _launch(values: int) -> tuple[int, int]:
    """(BLOCK, num_warps)."""
    block = min(max(triton.next_power_of_2(values), 64), 1024)
    return block, 4 if block > 256 else 2


def patch_rows(
    images: Tensor,
    image_ids: Tensor | None,
    patch_ids: Tensor | None,
    scale_shift: Tensor | None,
    patch: tuple[int, int],
    rows: Tensor,
) -> None:
    """Fills rows [S, K, V]; images are [B, C, H, W] with any strides, the others contiguous."""
    sequences, length, values = rows.shape
    if rows.numel() == 0:
        return
    block, warps = _launch(values)
    _rows[(sequences * length,)](
        images,
        images if image_ids is None else image_ids,
        images if patch_ids is None else patch_ids,
        images if scale_shift is None else scale_shift,
        rows,
        *images.stride(), length, images.shape[3] // patch[1], images.shape[1], *patch,
        image_ids is not None, patch_ids is not None, scale_shift is not None, block, num_warps=warps,
    )  # fmt: skip


_STRIDES = {"stride_b": "i32", "stride_c": "i32", "stride_h": "i32", "stride_w": "i32"}


def _config(pixel: str, row: str, side: int, mixed: bool, scale: bool) -> Config:
    block, warps = _launch(3 * side * side)
    return Config(
        _rows,
        {"images": f"*{pixel}", "image_ids": "*i64", "patch_ids": "*i64", "scale_shift": "*fp32", "rows": f"*{row}"}
        | _STRIDES
        | {"K": "i32", "grid_columns": "i32"},
        {"C": 3, "P": side, "Q": side, "IMAGES": mixed, "PATCHES": not mixed, "SCALE": scale, "BLOCK": block},
        num_warps=warps,
        aligned=("images", "image_ids", "patch_ids", "scale_shift", "rows"),
    )


AHEAD_OF_TIME = [
    _config(pixel, row, side, mixed, pixel == "u8")
    for pixel, row in (("u8", "fp32"), ("u8", "bf16"), ("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"))
    for side in (14, 16)
    for mixed in (False, True)
]
