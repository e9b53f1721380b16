"""Triton kernels for the decoder's sequence: one pass forward, one pass and a sum of its parts backward.

Legend: B batch, in groups of G with the same visible tokens, P prefix tokens, K visible patches, N patches, T = P + N,
E width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmim.kernels.ahead_of_time import Config

IMAGES_OF_PART = 32  # whose gradients one program adds up, whatever the device: the same sums everywhere


@triton.jit
def _norm(x, inside, E, eps):
    """Rows [ROWS, BLOCK] centred and scaled to variance 1, zeros outside; 1 / deviation [ROWS]."""
    mean = tl.div_rn(tl.sum(x, axis=1), E * 1.0)
    centred = tl.where(inside, x - mean[:, None], 0.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(centred * centred, axis=1), E * 1.0) + eps))
    return centred * scale[:, None], scale


@triton.jit
def _forward(
    visible,  # *[B / G, P + K, E], channels side by side
    mask_token,  # *[N, E] or [E] fp32
    ids_restore,  # *[B, N] int64
    positions,  # *[T, E] fp32; only with POSITIONS
    norm_weight,  # *[E] fp32; only with NORM
    norm_bias,  # *[E] fp32; only with BIAS
    sequence,  # *[B, T, E] contiguous
    normed,  # *[B, T, E] contiguous; only with NORM
    rows,  # B * T
    visible_batch, visible_token, mask_row,  # strides
    P, K, N, E, eps,
    POSITIONS: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr,
    GROUP: tl.constexpr,  # G
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # channels of a program; at least E with NORM
):  # fmt: skip
    """One program per ROWS tokens and BLOCK channels. Reads a visible token or the mask token, writes 1 or 2 rows."""
    # int64, because B * T * E may exceed 2**31
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b, t = row // (P + N), row % (P + N)
    exists, patch = row < rows, t - P
    id = tl.load(ids_restore + b * N + patch, mask=exists & (patch >= 0), other=0)
    shown = (patch < 0) | ((id >= 0) & (id < K))
    token = tl.where(patch < 0, t, P + id)
    inside = exists[:, None] & (channel < E)[None, :]
    at = visible + (b // GROUP * visible_batch + token * visible_token)[:, None] + channel[None, :]
    x = tl.load(at, mask=inside & shown[:, None], other=0.0).to(tl.float32)
    at = mask_token + (patch * mask_row)[:, None] + channel[None, :]
    x = tl.where(shown[:, None], x, tl.load(at, mask=inside & (shown == 0)[:, None], other=0.0))
    if POSITIONS:
        x += tl.load(positions + (t * E)[:, None] + channel[None, :], mask=inside, other=0.0)
    to = (row * E)[:, None] + channel[None, :]
    tl.store(sequence + to, x.to(sequence.dtype.element_ty), mask=inside)
    if NORM:
        y, _ = _norm(x, inside, E, eps)
        y *= tl.load(norm_weight + channel, mask=channel < E, other=0.0)[None, :]
        if BIAS:
            y += tl.load(norm_bias + channel, mask=channel < E, other=0.0)[None, :]
        tl.store(normed + to, y.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_sequence,  # *[B, T, E] contiguous; only with DIRECT
    grad_normed,  # *[B, T, E] contiguous; only with NORM
    visible,  # *[B / G, P + K, E], channels side by side; only with NORM
    mask_token,  # *[N, E] or [E] fp32; only with NORM
    ids_restore,  # *[B, N] int64
    positions,  # *[T, E] fp32; only with NORM and POSITIONS
    norm_weight,  # *[E] fp32; only with NORM
    grad_visible,  # *[B / G, P + K, E] contiguous
    of_prefix,  # *[B, P, E] fp32: of prefix tokens, image by image; only with GROUP > 1
    of_masked,  # *[parts, T, E] fp32: summed over the masked images of a part
    of_visible,  # *[parts, T, E] fp32: summed over the others; only with WANTED
    of_weight, of_bias,  # *[parts, T, E] fp32; only with NORM
    B, visible_batch, visible_token, mask_row,
    P, K, N, E, eps,
    DIRECT: tl.constexpr, NORM: tl.constexpr, POSITIONS: tl.constexpr, WANTED: tl.constexpr,
    GROUP: tl.constexpr,  # G
    PART: tl.constexpr,  # images of a program
    ROWS: tl.constexpr,  # images at a time
    BLOCK: tl.constexpr,  # channels of a program; at least E with NORM
):  # fmt: skip
    """One program per position, part of the images and BLOCK channels. Reads the gradients once, writes those of
    visible tokens; LayerNorm's backward is linear in them, so that masked images, whose row is the same, share one."""
    t = tl.program_id(0)
    part = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    channels = channel < E
    direct = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    through = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    kept = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    weights = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    biases = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    position = tl.zeros([BLOCK], dtype=tl.float32)
    weight = tl.zeros([BLOCK], dtype=tl.float32)
    anywhere = tl.zeros([ROWS], dtype=tl.int32)
    if NORM:
        weight += tl.load(norm_weight + channel, mask=channels, other=0.0)
        if POSITIONS:
            position += tl.load(positions + t.to(tl.int64) * E + channel, mask=channels, other=0.0)
    for start in range(0, tl.minimum(B - tl.program_id(1) * PART, PART), ROWS):
        b = part * PART + start + tl.arange(0, ROWS)  # int64, because B * T * E may exceed 2**31
        exists = b < B
        id = tl.load(ids_restore + b * N + (t - P), mask=exists & (t >= P), other=0)
        shown = exists & ((t < P) | ((id >= 0) & (id < K)))
        token = tl.where(t < P, t, P + id)
        inside = exists[:, None] & channels[None, :]
        anywhere += (exists & (shown == 0)).to(tl.int32)
        at = ((b * (P + N) + t) * E)[:, None] + channel[None, :]
        gradient = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        if DIRECT:
            gradient += tl.load(grad_sequence + at, mask=inside, other=0.0).to(tl.float32)
            direct += tl.where(shown[:, None], 0.0, gradient)
        if NORM:
            g = tl.load(grad_normed + at, mask=inside, other=0.0).to(tl.float32)
            through += tl.where(shown[:, None], 0.0, g)
            seen = shown[:, None] & channels[None, :]
            from_ = visible + (b // GROUP * visible_batch + token * visible_token)[:, None] + channel[None, :]
            x = tl.load(from_, mask=seen, other=0.0).to(tl.float32) + position[None, :]
            y, scale = _norm(x, seen, E, eps)
            g = tl.where(seen, g, 0.0)
            weights += g * y
            biases += g
            g *= weight[None, :]
            mean, product = tl.sum(g, axis=1) / E, tl.sum(g * y, axis=1) / E
            gradient += scale[:, None] * (g - mean[:, None] - y * product[:, None])
        own = shown
        if GROUP > 1:  # a prefix token is every image's of its group
            own = shown & (t >= P)
            to = of_prefix + ((b * P + t) * E)[:, None] + channel[None, :]
            tl.store(to, gradient, mask=inside & (shown & (t < P))[:, None])
        to = grad_visible + ((b // GROUP * (P + K) + token) * E)[:, None] + channel[None, :]
        tl.store(to, gradient.to(grad_visible.dtype.element_ty), mask=inside & own[:, None])
        if WANTED:
            kept += tl.where(shown[:, None], gradient, 0.0)
    masked = tl.sum(direct, axis=0)
    to = (part * (P + N) + t) * E + channel
    if NORM:
        g = tl.sum(through, axis=0)[None, :]
        # A token that no image of the part shows is not read: it may hold anything.
        any_masked = tl.sum(anywhere) > 0
        token_row = mask_token + (t - P).to(tl.int64) * mask_row + channel
        x = tl.load(token_row, mask=channels & any_masked, other=0.0) + position
        y, scale = _norm(x[None, :], channels[None, :], E, eps)
        tl.store(of_weight + to, tl.sum(weights, axis=0) + tl.sum(g * y, axis=0), mask=channels)
        tl.store(of_bias + to, tl.sum(biases, axis=0) + tl.sum(g, axis=0), mask=channels)
        g *= weight[None, :]
        mean, product = tl.sum(g, axis=1) / E, tl.sum(g * y, axis=1) / E
        masked += tl.sum(
            tl.where(channels[None, :], scale[:, None] * (g - mean[:, None] - y * product[:, None]), 0.0), axis=0
        )
    tl.store(of_masked + to, masked, mask=channels)
    if WANTED:
        tl.store(of_visible + to, tl.sum(kept, axis=0), mask=channels)


def _launch(width: int, norm: bool, backward: bool) -> tuple[int, int, int]:
    """(ROWS, BLOCK, num_warps): 2048 elements a program, fewer a thread where five sums are kept."""
    block = max(triton.next_power_of_2(width), 16)
    if not norm:
        block = min(block, 512)
    elements = (1024 if norm else 4096) if backward else 2048
    rows = max(1, min(elements // block, 8))
    if backward and norm:
        return rows, block, max(4, rows * block // 128)
    return rows, block, 4 if rows * block <= 2048 else 8


def forward(
    visible: Tensor,
    mask_token: Tensor,
    ids_restore: Tensor,
    positions: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    prefix: int,
    group: int,
    eps: float,
    sequence: Tensor,
    normed: Tensor,
) -> None:
    """Fills sequence [B, T, E] and, with norm_weight, normed [B, T, E]."""
    batch, tokens, width = sequence.shape
    rows, block, warps = _launch(width, norm_weight is not None, False)
    if sequence.numel():
        _forward[(triton.cdiv(batch * tokens, rows), triton.cdiv(width, block))](
            visible, mask_token, ids_restore, _or(positions, mask_token), _or(norm_weight, mask_token),
            _or(norm_bias, mask_token), sequence, normed, batch * tokens,
            visible.stride(0), visible.stride(1), _mask_row(mask_token),
            prefix, visible.shape[1] - prefix, tokens - prefix, width, eps,
            positions is not None, norm_weight is not None, norm_bias is not None, group, rows, block,
            num_warps=warps,
        )  # fmt: skip


def backward(
    grad_sequence: Tensor | None,
    grad_normed: Tensor | None,
    visible: Tensor | None,
    mask_token: Tensor,
    ids_restore: Tensor,
    positions: Tensor | None,
    norm_weight: Tensor | None,
    prefix: int,
    group: int,
    eps: float,
    grad_visible: Tensor,
    grad_mask_token: Tensor,
    grad_positions: Tensor,
    grad_norm_weight: Tensor,
    grad_norm_bias: Tensor,
) -> None:
    """Fills the gradients; that of positions where it is not empty."""
    (batch, patches), (_, tokens, width) = ids_restore.shape, grad_visible.shape
    norm, wanted = grad_normed is not None, grad_positions.numel() > 0
    rows, block, warps = _launch(width, norm, True)
    parts = triton.cdiv(batch, IMAGES_OF_PART)
    shape = (parts, prefix + patches, width)
    of_masked, of_visible, of_weight, of_bias = (
        mask_token.new_empty(shape if needed else (0,)) for needed in (True, wanted, norm, norm)
    )
    of_prefix = mask_token.new_empty((batch, prefix, width) if group > 1 else (0,))
    grad_visible.zero_()  # a token that no place asks for gets no gradient
    if of_masked.numel():
        _backward[(prefix + patches, parts, triton.cdiv(width, block))](
            _or(grad_sequence, mask_token), _or(grad_normed, mask_token), _or(visible, mask_token), mask_token,
            ids_restore, _or(positions, mask_token), _or(norm_weight, mask_token), grad_visible,
            of_prefix, of_masked, of_visible, of_weight, of_bias, batch,
            *((0, 0) if visible is None else (visible.stride(0), visible.stride(1))), _mask_row(mask_token),
            prefix, tokens - prefix, patches, width, eps,
            grad_sequence is not None, norm, positions is not None, wanted, group,
            IMAGES_OF_PART, rows, block, num_warps=warps,
        )  # fmt: skip
    if group > 1 and of_prefix.numel():
        grad_visible[:, :prefix] = of_prefix.unflatten(0, (-1, group)).sum(1)
    masked = of_masked.sum(0)
    torch.sum(masked[prefix:], 0, out=grad_mask_token) if mask_token.dim() == 1 else grad_mask_token.copy_(
        masked[prefix:]
    )
    if wanted:
        torch.add(of_visible.sum(0), masked, out=grad_positions)
    if norm:
        torch.sum(of_weight, (0, 1), out=grad_norm_weight)
        torch.sum(of_bias, (0, 1), out=grad_norm_bias)
    else:
        grad_norm_weight.zero_(), grad_norm_bias.zero_()


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for an argument that is not read."""
    return other if tensor is None else tensor


def _mask_row(mask_token: Tensor) -> int:
    return mask_token.shape[1] if mask_token.dim() == 2 else 0


_SIZES = dict.fromkeys(("visible_batch", "visible_token", "mask_row", "P", "K", "N", "E"), "i32") | {"eps": "fp32"}
_ROWS = ("visible", "mask_token", "positions", "norm_weight")


def _configs(element: str, sequence: str, width: int, *, norm: bool, positions: bool, group: int = 1) -> list[Config]:
    """Forward and backward for one type of tokens and sequence, and one width."""
    both = {"visible": f"*{element}", "mask_token": "*fp32", "ids_restore": "*i64", "positions": "*fp32"}
    both |= {"norm_weight": "*fp32", **_SIZES}
    onward = {"norm_bias": "*fp32", "sequence": f"*{sequence}", "normed": f"*{element}", "rows": "i32"}
    back = {"grad_sequence": f"*{sequence}", "grad_normed": f"*{element}", "grad_visible": f"*{element}", "B": "i32"}
    sums = ("of_masked", "of_visible", "of_weight", "of_bias")
    back |= dict.fromkeys((*sums, "of_prefix"), "*fp32")
    aligned = (*_ROWS, "visible_batch", "visible_token", "mask_row", "E")
    rows, block, warps = _launch(width, norm, False)
    constants = {"POSITIONS": positions, "NORM": norm, "BIAS": norm, "GROUP": group, "ROWS": rows, "BLOCK": block}
    ours = Config(
        _forward, both | onward, constants, num_warps=warps, aligned=(*aligned, "norm_bias", "sequence", "normed")
    )
    rows, block, warps = _launch(width, norm, True)
    constants = {"DIRECT": True, "NORM": norm, "POSITIONS": positions, "WANTED": positions}
    constants |= {"GROUP": group, "PART": IMAGES_OF_PART, "ROWS": rows, "BLOCK": block}
    aligned = (*aligned, "grad_sequence", "grad_normed", "grad_visible", "of_prefix", *sums)
    return [ours, Config(_backward, both | back, constants, num_warps=warps, aligned=aligned)]


AHEAD_OF_TIME = [
    *_configs("fp32", "fp32", 512, norm=True, positions=True),  # MAE's decoder
    *_configs("bf16", "bf16", 512, norm=True, positions=True),
    *_configs("bf16", "fp32", 512, norm=True, positions=True),
    *_configs("fp16", "fp32", 192, norm=True, positions=True),
    *_configs("bf16", "bf16", 1024, norm=True, positions=True),
    *_configs("fp32", "fp32", 1280, norm=True, positions=True),
    *_configs("fp32", "fp32", 512, norm=False, positions=True),
    *_configs("bf16", "fp32", 512, norm=False, positions=True, group=4),  # MixedAE
    *_configs("fp32", "fp32", 512, norm=True, positions=True, group=2),
    *_configs("bf16", "bf16", 1536, norm=False, positions=False),  # queries, keys and values of its first block
]
