"""Triton kernels around the Fourier transform of A²MIM's loss: error before, spectrum after, gradient at the end.

Legend: B batch, I transformed images (B, or 1 for the mean over the batch), C channels, H W image, P x Q pixels a cell,
N = gh * gw cells, R = W//2 + 1 columns of a half spectrum.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim.kernels.ahead_of_time import Config
from fastmim.kernels.masked_patch_loss import pixel_loss, pixel_slope
from fastmim.ops.frequency_plan import KINDS, Plan

SQUARED, MODULUS, LOG, SPATIAL_L1 = (tl.constexpr(i) for i in range(4))  # places in KINDS; the fifth is focal_l1
L1, FOCAL_L1 = tl.constexpr(1), tl.constexpr(2)  # as `pixel_loss` numbers them


@triton.jit
def _removed(
    mask,  # *[N] int8, of one image
    pixel,  # [BLOCK] int32 row-major in a plane
    inside,  # [BLOCK] bool
    W, P, Q, grid_columns,
):  # fmt: skip
    """Whether the cell of each pixel is removed, int1; False outside."""
    cell = pixel // W // P * grid_columns + pixel % W // Q
    return tl.load(mask + cell, mask=inside, other=0) != 0


@triton.jit
def _error(
    prediction,  # *[B, C, H, W], strided
    image,  # *[B, C, H, W], strided
    mask,  # *[B, N] int8 view of bool, 1 = removed
    means,  # *[B, C] fp32 mean of each plane of the image; only with MEAN
    out,  # *[I, C, H, W] fp32
    prediction_b, prediction_c, prediction_h, prediction_w,  # strides
    image_b, image_c, image_h, image_w,  # strides
    factor, mean_weight,  # fp32: of the error and of (mean - image) on visible pixels
    members,  # images added up into one: B or 1
    C, H, W, N, P, Q, grid_columns,
    VISIBLE: tl.constexpr,  # factor is not 0
    MEAN: tl.constexpr,  # mean_weight is not 0
    BLOCK: tl.constexpr,  # pixels of a program
):  # fmt: skip
    """One program per (plane of an image to be transformed, block of pixels). Reads prediction and image once, visible
    pixels only if they matter; adds up over the batch in its order."""
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.program_id(0).to(tl.int64)  # i * C + c; int64, because I * C * H * W may exceed 2**31
    first, c = plane // C, plane % C
    inside = pixel < H * W
    h, w = (pixel // W).to(tl.int64), (pixel % W).to(tl.int64)
    prediction += c * prediction_c + h * prediction_h + w * prediction_w
    image += c * image_c + h * image_h + w * image_w
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for member in range(0, members):
        b = first + member
        removed = _removed(mask + b * N, pixel, inside, W, P, Q, grid_columns)
        read = inside if VISIBLE else removed
        guess = tl.load(prediction + b * prediction_b, mask=read, other=0.0).to(tl.float32)
        true = tl.load(image + b * image_b, mask=inside if MEAN else read, other=0.0).to(tl.float32)
        error = tl.where(removed, guess - true, factor * (guess - true) if VISIBLE else 0.0)
        if MEAN:
            error += tl.where(removed, 0.0, mean_weight * (tl.load(means + b * C + c) - true))
        total += error
    tl.store(out + plane * H * W + pixel, tl.div_rn(total, members * 1.0), mask=inside)


@triton.jit
def _power(r, exponent, POWER: tl.constexpr):
    """r ** exponent for r >= 0; POWER is the exponent where it is 0, 1 or 2, else -1."""
    if POWER == 0:
        return r * 0.0 + 1.0
    elif POWER == 1:
        return r
    elif POWER == 2:
        return r * r
    else:
        return tl.where(r > 0, tl.exp2(exponent * tl.log2(tl.where(r > 0, r, 1.0))), 0.0)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0: of 1 + x as rounded, plus what the rounding lost."""
    u = 1.0 + x
    return tl.log(u) + (x - (u - 1.0)) / u


@triton.jit
def _spectrum(
    spectrum,  # *[I, C, H, R, 2] fp32
    gradient,  # *[I, C, H, R, 2] fp32: spectrum times the derivative by the modulus over the modulus
    partial,  # *[I, blocks, 2] fp32: sum of values, maximum of |D|^2
    exponent,  # fp32, of |D| in the weight
    frequencies,  # C * H * R
    R, W,
    KIND: tl.constexpr,  # place in KINDS
    POWER: tl.constexpr,  # exponent where it is 0, 1 or 2, else -1
    BLOCK: tl.constexpr,  # frequencies of a program
):  # fmt: skip
    """One program per (block of frequencies, image). Reads and writes 8 bytes a frequency."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(1).to(tl.int64)  # int64, because I * C * H * R may exceed 2**31
    inside = index < frequencies
    at = 2 * (image * frequencies + index)
    re = tl.load(spectrum + at, mask=inside, other=0.0)
    im = tl.load(spectrum + at + 1, mask=inside, other=0.0)
    square = re * re + im * im
    r = tl.sqrt_rn(square)
    divisor = tl.where(r > 0, r, 1.0)
    if KIND == SQUARED:
        weight = _power(r, exponent, POWER)
        value, slope = weight * square, 2.0 * weight
    elif KIND == LOG:
        weight = _log1p(_power(r, exponent, POWER))
        value, slope = weight * square, 2.0 * weight
    elif KIND == MODULUS:
        weight = _power(r, exponent, POWER)
        value, slope = weight * r, tl.div_rn(tl.where(r > 0, weight, 0.0), divisor)
    elif KIND == SPATIAL_L1:
        value, slope = pixel_loss(r, L1), tl.div_rn(pixel_slope(r, L1), divisor)
    else:
        value, slope = pixel_loss(r, FOCAL_L1), tl.div_rn(pixel_slope(r, FOCAL_L1), divisor)
    tl.store(gradient + at, re * slope, mask=inside)
    tl.store(gradient + at + 1, im * slope, mask=inside)
    column = index % R
    value *= tl.where((column == 0) | (2 * column == W), 1.0, 2.0)
    at = 2 * (image * tl.num_programs(0) + tl.program_id(0))
    tl.store(partial + at, tl.sum(tl.where(inside, value, 0.0)))
    tl.store(partial + at + 1, tl.max(tl.where(inside, square, 0.0)))


@triton.jit
def _finish(
    partial,  # *[I, blocks, 2] fp32
    factor,  # *[I] fp32: scale / greatest weight
    value,  # *[I] fp64: share of the loss
    scale,  # fp32
    exponent,  # fp32
    blocks,
    KIND: tl.constexpr,
    POWER: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per image: adds up its blocks in one order."""
    image = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    most = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, blocks, BLOCK):
        index = start + tl.arange(0, BLOCK)
        at = partial + 2 * (image * blocks + index)
        total += tl.load(at, mask=index < blocks, other=0.0)
        most = tl.maximum(most, tl.load(at + 1, mask=index < blocks, other=0.0))
    result = scale
    if NORMALISE:
        greatest = _power(tl.sqrt_rn(tl.max(most)), exponent, POWER)
        if KIND == LOG:
            greatest = _log1p(greatest)
        result = tl.where(greatest > 0, tl.div_rn(scale, tl.where(greatest > 0, greatest, 1.0)), 0.0)
    tl.store(factor + image, result)
    tl.store(value + image, (tl.sum(total) * result).to(tl.float64))


@triton.jit
def _gradient(
    grad_loss,  # *scalar fp32
    picture,  # *[I, C, H, W] fp32 gradient by the transformed error, but for `factor`
    mask,  # *[B, N] int8 view of bool, 1 = removed
    factor,  # *[I] fp32
    out,  # *[B, C, H, W]
    share,  # fp32: of one image in its transformed one
    visible_weight,  # fp32
    C, H, W, N, P, Q, grid_columns,
    AVERAGE: tl.constexpr,  # one picture for all images
    BLOCK: tl.constexpr,  # pixels of a program
):  # fmt: skip
    """One program per (plane, block of pixels). Reads the picture, writes the gradient of every pixel."""
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    plane = tl.program_id(0).to(tl.int64)  # b * C + c; int64, because B * C * H * W may exceed 2**31
    b, c = plane // C, plane % C
    inside = pixel < H * W
    source = b * 0 if AVERAGE else b
    scale = tl.load(grad_loss) * tl.load(factor + source) * share
    removed = _removed(mask + b * N, pixel, inside, W, P, Q, grid_columns)
    value = tl.load(picture + (source * C + c) * H * W + pixel, mask=inside, other=0.0)
    value *= tl.where(removed, scale, scale * visible_weight)
    tl.store(out + plane * H * W + pixel, value.to(out.dtype.element_ty), mask=inside)


PIXELS, PIXELS_AVERAGED = 1024, 256  # few where a program walks through the batch
FREQUENCIES = 512  # 1024 spill on sm_80 with the focal loss


def _power_constant(exponent: float) -> int:
    return int(exponent) if exponent in (0, 1, 2) else -1


def error(
    prediction: Tensor, image: Tensor, mask: Tensor, cell: tuple[int, int], means: Tensor | None, how: Plan, out: Tensor
) -> None:
    """Fills out [I, C, H, W]."""
    batch, channels, height, width = image.shape
    block = PIXELS_AVERAGED if how.average else PIXELS
    _error[(out.shape[0] * channels, triton.cdiv(height * width, block))](
        prediction, image, mask.view(torch.int8), out if means is None else means, out,
        *prediction.stride(), *image.stride(), float(how.factor), float(how.mean_weight),
        batch if how.average else 1, channels, height, width, mask.shape[1], *cell, width // cell[1],
        how.factor != 0, how.mean_weight != 0, block, num_warps=4,
    )  # fmt: skip


def spectrum(
    spectrum: Tensor, width: int, how: Plan, scale: float, gradient: Tensor, factor: Tensor, value: Tensor
) -> None:
    """Fills gradient [I, C, H, R, 2], factor [I] and value [I] from spectrum."""
    frequencies = spectrum[0].numel() // 2
    blocks = triton.cdiv(frequencies, FREQUENCIES)
    partial = spectrum.new_empty((spectrum.shape[0], blocks, 2))
    kind, power = KINDS.index(how.kind), _power_constant(how.exponent)
    _spectrum[(blocks, spectrum.shape[0])](
        spectrum, gradient, partial, float(how.exponent), frequencies, spectrum.shape[3], width,
        kind, power, FREQUENCIES, num_warps=4,
    )  # fmt: skip
    _finish[(spectrum.shape[0],)](
        partial, factor, value, float(scale), float(how.exponent), blocks, kind, power, how.normalise, 128, num_warps=1
    )  # fmt: skip


def gradient(
    grad_loss: Tensor,
    picture: Tensor,
    mask: Tensor,
    cell: tuple[int, int],
    factor: Tensor,
    visible_weight: float,
    large: bool,
    out: Tensor,
) -> None:
    """Fills out [B, C, H, W]. `large` is the CPU kernel's."""
    batch, channels, height, width = out.shape
    average = picture.shape[0] != batch
    _gradient[(batch * channels, triton.cdiv(height * width, PIXELS))](
        grad_loss, picture, mask.view(torch.int8), factor, out, 1 / batch if average else 1.0, float(visible_weight),
        channels, height, width, mask.shape[1], *cell, width // cell[1], average, PIXELS, num_warps=4,
    )  # fmt: skip


_SIZES = dict.fromkeys(("C", "H", "W", "N", "P", "Q", "grid_columns"), "i32")


def _error_config(element: str, average: bool, visible: bool, mean: bool) -> Config:
    signature = {"prediction": f"*{element}", "image": "*fp32", "mask": "*i8", "means": "*fp32", "out": "*fp32"}
    signature |= {f"{name}_{axis}": "i32" for name in ("prediction", "image") for axis in "bch"}
    signature |= {"factor": "fp32", "mean_weight": "fp32", "members": "i32", **_SIZES}
    constants = {"prediction_w": 1, "image_w": 1, "VISIBLE": visible, "MEAN": mean}
    block = PIXELS_AVERAGED if average else PIXELS
    return Config(
        _error,
        signature,
        constants | {"BLOCK": block},
        aligned=("prediction", "image", "mask", "means", "out", "prediction_h", "image_h", "H", "W"),
    )


def _spectrum_configs(kind: str, power: int, normalise: bool) -> list[Config]:
    constants = {"KIND": KINDS.index(kind), "POWER": power}
    pointers = {"spectrum": "*fp32", "gradient": "*fp32", "partial": "*fp32"}
    sums = {
        "partial": "*fp32",
        "factor": "*fp32",
        "value": "*fp64",
        "scale": "fp32",
        "exponent": "fp32",
        "blocks": "i32",
    }
    return [
        Config(
            _spectrum,
            {**pointers, "exponent": "fp32", "frequencies": "i32", "R": "i32", "W": "i32"},
            constants | {"BLOCK": FREQUENCIES},
            aligned=(*pointers, "frequencies", "W"),
        ),
        Config(
            _finish,
            sums,
            constants | {"NORMALISE": normalise, "BLOCK": 128},
            num_warps=1,
            aligned=("partial", "factor", "value"),
        ),
    ]


def _gradient_config(element: str, average: bool) -> Config:
    pointers = {"grad_loss": "*fp32", "picture": "*fp32", "mask": "*i8", "factor": "*fp32", "out": f"*{element}"}
    return Config(
        _gradient,
        {**pointers, "share": "fp32", "visible_weight": "fp32", **_SIZES},
        {"AVERAGE": average, "BLOCK": PIXELS},
        aligned=(*pointers, "H", "W"),
    )


AHEAD_OF_TIME = [
    _error_config("fp32", average=True, visible=True, mean=False),  # the released configurations: 'mixed', averaged
    _error_config("bf16", average=True, visible=True, mean=False),
    _error_config("bf16", average=False, visible=False, mean=False),
    _error_config("fp16", average=False, visible=True, mean=True),
    *_spectrum_configs("squared", 1, True),
    *_spectrum_configs("squared", -1, False),
    *_spectrum_configs("modulus", -1, True),
    *_spectrum_configs("log", 1, True),
    *_spectrum_configs("log", -1, True),
    *_spectrum_configs("l1", 0, False),
    *_spectrum_configs("focal_l1", 0, False),
    *(_gradient_config(element, average) for element in ("fp32", "bf16", "fp16") for average in (False, True)),
]
