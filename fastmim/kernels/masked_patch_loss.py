"""Triton kernels for the loss over removed patches: one program per patch, then one program that adds up.

Legend: B batch, N = gh * gw patches, P x Q pixels and C channels a patch, V = P * Q * C values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim.kernels.ahead_of_time import Config
from fastmim.ops.masked_patch_loss import LOSSES, patch_strides

L2, L1 = tl.constexpr(0), tl.constexpr(1)  # places in LOSSES; the third is focal_l1


@triton.jit
def _tanh(x):
    """To a few units in the last place: a polynomial where |x| < 0.625, else 1 - 2 / (e^2|x| + 1)."""
    a = tl.abs(x)
    square = x * x
    near = square * -5.70498872745e-3 + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def pixel_loss(error, LOSS: tl.constexpr):
    """Elementwise loss; the focal weight 2 sigmoid(0.2|e|) - 1 is tanh(0.1|e|)."""
    if LOSS == L2:
        return error * error
    elif LOSS == L1:
        return tl.abs(error)
    else:
        return error * _tanh(error * 0.1)


@triton.jit
def pixel_slope(error, LOSS: tl.constexpr):
    """Derivative of `pixel_loss`."""
    if LOSS == L2:
        return 2.0 * error
    elif LOSS == L1:
        return tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, error))
    else:
        t = _tanh(error * 0.1)
        return t + error * 0.1 * (1.0 - t * t)


@triton.jit
def _inside_patch(
    index,  # [BLOCK] int32 numbers of values in a patch
    row, column, channel,  # strides
    P: tl.constexpr, Q: tl.constexpr, C: tl.constexpr,
    PLANAR: tl.constexpr,  # values are numbered (c, p, q), else (p, q, c)
):  # fmt: skip
    """Offsets of values from the first one of their patch; int64, because a plane may hold more than 2**31."""
    if PLANAR:
        p, q, c = index // Q % P, index % Q, index // (P * Q)
    else:
        p, q, c = index // (Q * C), index // C % Q, index % C
    return p.to(tl.int64) * row + q.to(tl.int64) * column + c.to(tl.int64) * channel


@triton.jit
def _forward(
    prediction,  # *patches, strided
    image,  # *patches, strided
    mask,  # *[B, N] int8 view of bool, 1 = removed
    statistics,  # *[B, N, 2] fp32 mean and 1/deviation, zeros where visible; only with NORM
    partial,  # *[B, N] fp32 loss summed over a removed patch, 0 where visible
    prediction_b, prediction_y, prediction_x, prediction_row, prediction_column, prediction_channel,  # strides
    image_b, image_y, image_x, image_row, image_column, image_channel,  # strides
    N, grid_columns,
    P: tl.constexpr, Q: tl.constexpr, C: tl.constexpr,
    PLANAR: tl.constexpr,
    NORM: tl.constexpr,
    LOSS: tl.constexpr,
    BLOCK: tl.constexpr,  # values handled at a time
):  # fmt: skip
    """One program per patch. Reads both rows of V values from memory once when removed (again from L1 for the
    statistics), nothing when visible."""
    patch = tl.program_id(0).to(tl.int64)  # b * N + n; int64, because B * N * V may exceed 2**31
    b, n = patch // N, patch % N
    y, x = n // grid_columns, n % grid_columns
    prediction += b * prediction_b + y * prediction_y + x * prediction_x
    image += b * image_b + y * image_y + x * image_x
    removed = tl.load(mask + patch).to(tl.int32)
    limit = removed * (P * Q * C)
    mean, scale = 0.0, 1.0
    if NORM:
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, P * Q * C, BLOCK):
            index = start + tl.arange(0, BLOCK)
            at = _inside_patch(index, image_row, image_column, image_channel, P, Q, C, PLANAR)
            total += tl.load(image + at, mask=index < limit, other=0.0).to(tl.float32)
        # Rounded divisions and roots: an error here would be every value's.
        mean = tl.div_rn(tl.sum(total), 1.0 * P * Q * C)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, P * Q * C, BLOCK):
            index = start + tl.arange(0, BLOCK)
            at = _inside_patch(index, image_row, image_column, image_channel, P, Q, C, PLANAR)
            centred = tl.load(image + at, mask=index < limit, other=0.0).to(tl.float32) - mean
            total += tl.where(index < limit, centred * centred, 0.0)
        variance = tl.div_rn(tl.sum(total), 1.0 * max(P * Q * C - 1, 1))
        scale = tl.div_rn(1.0, tl.sqrt_rn(variance + 1e-6))
        tl.store(statistics + 2 * patch, mean)
        tl.store(statistics + 2 * patch + 1, tl.where(removed != 0, scale, 0.0))
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, P * Q * C, BLOCK):
        index = start + tl.arange(0, BLOCK)
        at = _inside_patch(index, image_row, image_column, image_channel, P, Q, C, PLANAR)
        target = tl.load(image + at, mask=index < limit, other=0.0).to(tl.float32)
        at = _inside_patch(index, prediction_row, prediction_column, prediction_channel, P, Q, C, PLANAR)
        guess = tl.load(prediction + at, mask=index < limit, other=0.0).to(tl.float32)
        error = tl.where(index < limit, guess - (target - mean) * scale, 0.0)
        total += pixel_loss(error, LOSS)
    tl.store(partial + patch, tl.sum(total))


@triton.jit
def _finish(
    partial,  # *[B * N] fp32
    mask,  # *[B * N] int8, 1 = removed
    mean_loss,  # *scalar fp32
    scale,  # *scalar fp32, 1 / (number of removed values)
    patches,  # B * N
    values,  # V
    BLOCK: tl.constexpr,
):
    """One program: sums in one order, so two runs agree to the bit. Reads 5 bytes per patch."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    count = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, patches, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(partial + index, mask=index < patches, other=0.0)
        count += tl.load(mask + index, mask=index < patches, other=0).to(tl.int64)
    removed = tl.maximum(tl.sum(count), 1).to(tl.float32)
    inverse = tl.div_rn(1.0, removed * values)
    tl.store(mean_loss, tl.div_rn(tl.sum(total), removed * values))
    tl.store(scale, inverse)


@triton.jit
def _backward(
    grad_loss,  # *scalar fp32
    scale,  # *scalar fp32, 1 / (number of removed values)
    prediction,  # *patches, strided
    image,  # *patches, strided
    mask,  # *[B, N] int8 view of bool, 1 = removed
    statistics,  # *[B, N, 2] fp32; only with NORM
    gradient,  # *patches, strided; every value is written
    prediction_b, prediction_y, prediction_x, prediction_row, prediction_column, prediction_channel,  # strides
    image_b, image_y, image_x, image_row, image_column, image_channel,  # strides
    gradient_b, gradient_y, gradient_x, gradient_row, gradient_column, gradient_channel,  # strides
    N, grid_columns,
    P: tl.constexpr, Q: tl.constexpr, C: tl.constexpr,
    PLANAR: tl.constexpr,
    NORM: tl.constexpr,
    LOSS: tl.constexpr,
    BLOCK: tl.constexpr,  # values handled by one program
):  # fmt: skip
    """One program per patch and block of values. Reads both rows when removed, writes V values in any case."""
    patch = tl.program_id(0).to(tl.int64)  # b * N + n; int64, because B * N * V may exceed 2**31
    b, n = patch // N, patch % N
    y, x = n // grid_columns, n % grid_columns
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    limit = tl.load(mask + patch).to(tl.int32) * (P * Q * C)
    mean, inverse = 0.0, 1.0
    if NORM:
        mean, inverse = tl.load(statistics + 2 * patch), tl.load(statistics + 2 * patch + 1)
    at = _inside_patch(index, image_row, image_column, image_channel, P, Q, C, PLANAR)
    at += b * image_b + y * image_y + x * image_x
    target = tl.load(image + at, mask=index < limit, other=0.0).to(tl.float32)
    at = _inside_patch(index, prediction_row, prediction_column, prediction_channel, P, Q, C, PLANAR)
    at += b * prediction_b + y * prediction_y + x * prediction_x
    guess = tl.load(prediction + at, mask=index < limit, other=0.0).to(tl.float32)
    slope = pixel_slope(guess - (target - mean) * inverse, LOSS) * (tl.load(grad_loss) * tl.load(scale))
    at = _inside_patch(index, gradient_row, gradient_column, gradient_channel, P, Q, C, PLANAR)
    at += b * gradient_b + y * gradient_y + x * gradient_x
    result = tl.where(index < limit, slope, 0.0)
    tl.store(gradient + at, result.to(gradient.dtype.element_ty), mask=index < P * Q * C)


SUM_BLOCK = 4096


def _launch(patch_values: int) -> tuple[int, int]:
    """(BLOCK, num_warps): a patch at a time up to 2048 values; 4096 spill on sm_90."""
    block = min(max(triton.next_power_of_2(patch_values), 64), 2048)
    return block, 4 if block <= 1024 else 8


def _shape(prediction: Tensor, image: Tensor, p: int, q: int) -> tuple[int, int, bool]:
    """(gw, C, PLANAR): the order of values follows the prediction."""
    channels = image.shape[1]
    return image.shape[3] // q, channels, channels > 1 and prediction.stride(-1 if prediction.dim() == 3 else 1) != 1


def forward(
    prediction: Tensor,
    image: Tensor,
    mask: Tensor,
    patch: tuple[int, int],
    loss: str,
    mean_loss: Tensor,
    statistics: Tensor,
    scale: Tensor,
    partial: Tensor,
) -> None:
    """Fills mean_loss [], statistics [B, N, 2] (empty: no normalisation), scale [] and partial [B, N]."""
    p, q = patch
    grid_columns, channels, planar = _shape(prediction, image, p, q)
    values = p * q * channels
    block, warps = _launch(values)
    removed = mask.view(torch.int8)
    if mask.numel():
        _forward[(mask.numel(),)](
            prediction, image, removed, statistics, partial,
            *patch_strides(prediction, channels, grid_columns, p, q),
            *patch_strides(image, channels, grid_columns, p, q),
            mask.shape[1], grid_columns, p, q, channels,
            planar, statistics.numel() > 0, LOSSES.index(loss), block, num_warps=warps,
        )  # fmt: skip
    _finish[(1,)](partial, removed, mean_loss, scale, mask.numel(), values, SUM_BLOCK, num_warps=8)


def backward(
    grad_loss: Tensor,
    prediction: Tensor,
    image: Tensor,
    mask: Tensor,
    patch: tuple[int, int],
    loss: str,
    statistics: Tensor,
    scale: Tensor,
    gradient: Tensor,
) -> None:
    """Fills gradient, shaped as the prediction."""
    p, q = patch
    grid_columns, channels, planar = _shape(prediction, image, p, q)
    block, warps = _launch(p * q * channels)
    if mask.numel() == 0:
        return
    _backward[(mask.numel(), triton.cdiv(p * q * channels, block))](
        grad_loss, scale, prediction, image, mask.view(torch.int8), statistics, gradient,
        *patch_strides(prediction, channels, grid_columns, p, q),
        *patch_strides(image, channels, grid_columns, p, q),
        *patch_strides(gradient, channels, grid_columns, p, q),
        mask.shape[1], grid_columns, p, q, channels,
        planar, statistics.numel() > 0, LOSSES.index(loss), block, num_warps=warps,
    )  # fmt: skip


_STRIDES = ("b", "y", "x", "row", "column", "channel")
_TENSORS = {"mask": "*i8", "statistics": "*fp32", "N": "i32", "grid_columns": "i32"}


def _configs(element: str, side: int, channels: int, planar: bool, norm: bool, loss: str) -> list[Config]:
    """Forward and backward for one element type, patch and kind of loss."""
    block, warps = _launch(side * side * channels)
    constants = {
        "P": side, "Q": side, "C": channels, "PLANAR": planar, "NORM": norm, "LOSS": LOSSES.index(loss), "BLOCK": block
    }  # fmt: skip
    both = {"prediction": f"*{element}", "image": "*fp32", **_TENSORS}
    both |= {f"{name}_{stride}": "i32" for name in ("prediction", "image") for stride in _STRIDES}
    back = {**both, "grad_loss": "*fp32", "scale": "*fp32", "gradient": f"*{element}"}
    back |= {f"gradient_{stride}": "i32" for stride in _STRIDES}
    aligned = ("prediction", "image", "mask", "statistics")
    return [
        Config(_forward, {**both, "partial": "*fp32"}, constants, num_warps=warps, aligned=(*aligned, "partial")),
        Config(_backward, back, constants, num_warps=warps, aligned=(*aligned, "grad_loss", "scale", "gradient")),
    ]


AHEAD_OF_TIME = [
    Config(
        _finish,
        {"partial": "*fp32", "mask": "*i8", "mean_loss": "*fp32", "scale": "*fp32", "patches": "i32", "values": "i32"},
        {"BLOCK": SUM_BLOCK},
        num_warps=8,
        aligned=("partial", "mask", "mean_loss", "scale"),
    ),
    *_configs("fp32", 16, 3, False, True, "l2"),  # MAE
    *_configs("bf16", 16, 3, False, True, "l2"),
    *_configs("fp32", 32, 3, True, False, "l1"),  # SimMIM, A²MIM: images predicted, cells of 32 pixels
    *_configs("bf16", 32, 3, True, False, "focal_l1"),
    *_configs("fp16", 16, 13, False, True, "focal_l1"),
    *_configs("fp32", 32, 13, True, True, "focal_l1"),  # more values than a block
]
