"""How many cells a mask removes, how large they are, and how they are spread over tokens and pixels.

A cell is the unit that is removed or kept as a whole: a patch for MAE, a square of about 32 pixels for SimMIM and
A²MIM. Every image of a batch loses the same number of cells, so all shapes are known before the step.
"""

import math
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from fastmim.layers.row_index import inverse_permutation
from fastmim.methods.base import size_text
from fastmim.ops import Masks
from fastmim.ops.masks import upsample_mask

Rounding = Literal["ceil", "floor", "round"]


def count_kept(num_cells: int, mask_ratio: float, rounding: Rounding, method: str) -> int:
    """Visible cells per image.

    `rounding` is the paper's: "ceil" keeps N - ceil(N·r) (SimMIM, A²MIM: 30 of 49 removed), "floor" keeps
    int(N·(1-r)) (MAE: 49 of 196 kept), "round" keeps round(N·(1-r)) (SparK). The ratio is taken as the decimal that
    was written, so 0.9 of 100 cells keeps 10, where floating point would keep 9.

    Raises:
        ValueError: a ratio that removes no cell or every cell: there would be nothing to learn, or nothing to see.
    """
    if not 0.0 <= mask_ratio <= 1.0:
        raise ValueError(f"{method}: mask_ratio is the removed share of an image, between 0 and 1; got {mask_ratio}.")
    ratio = Fraction(str(mask_ratio))
    if rounding == "ceil":
        kept = num_cells - math.ceil(num_cells * ratio)
    elif rounding == "floor":
        kept = math.floor(num_cells * (1 - ratio))
    else:
        kept = round(num_cells * (1 - ratio))
    if kept >= num_cells:
        raise ValueError(
            f"{method}: mask_ratio {mask_ratio} removes none of the {num_cells} cells of an image, so nothing would be "
            f"predicted; raise the ratio or make the cells smaller."
        )
    if kept <= 0:
        raise ValueError(
            f"{method}: mask_ratio {mask_ratio} removes all {num_cells} cells of an image, so nothing would be seen; "
            f"lower the ratio or make the cells smaller."
        )
    return kept


def cell_grid(img_size: tuple[int, int], cell: tuple[int, int], method: str, what: str) -> tuple[int, int]:
    """(rows, columns) of cells, or a sentence that says which side does not divide."""
    for side, step, axis in zip(img_size, cell, ("height", "width"), strict=True):
        if side % step:
            near = [size for size in (side // step * step, (side // step + 1) * step) if size]
            raise ValueError(
                f"{method}: image {axis} {side} is not divisible by {what} {step} (images of {size_text(img_size)} "
                f"pixels); {' or '.join(map(str, near))} would be."
            )
    return img_size[0] // cell[0], img_size[1] // cell[1]


def choose_cell(img_size: tuple[int, int], stride: int) -> int:
    """Side of a mask cell in pixels, for images of any size.

    The papers' 32 pixels where the short side is 192 or more; below that a sixth of the short side; in both cases the
    nearest (in ratio) multiple of `stride`, the pixels per token where the mask is used, that divides both sides.
    """
    wanted = min(32.0, min(img_size) / 6)
    common = math.gcd(*img_size)
    fitting = [side for side in range(stride, common + 1, stride) if common % side == 0]
    return min(fitting, key=lambda side: (abs(math.log(side / wanted)), -side), default=stride)


def check_cell(cell: int | None, img_size: tuple[int, int], stride: int, method: str) -> int:
    """The side of a mask cell, chosen when None, that whole tokens of `stride` pixels fill."""
    cell = choose_cell(img_size, stride) if cell is None else cell
    if cell <= 0 or cell % stride:
        raise ValueError(
            f"{method}: mask_patch_size {cell} is not a multiple of the {stride} pixels per token where the mask token "
            f"enters, so a cell would cut tokens in two; use {max(1, round(cell / stride)) * stride}."
        )
    return cell


def removed_tokens(mask: Tensor, grid: tuple[int, int], token_grid: tuple[int, int]) -> Tensor:
    """Cell mask [B, N] nearest-repeated to a token grid: bool [B, rows, columns], True = removed."""
    return upsample_mask(mask, grid, token_grid)


def removed_pixels(mask: Tensor, grid: tuple[int, int], img_size: tuple[int, int]) -> Tensor:
    """Cell mask [B, N] nearest-repeated to pixels: bool [B, 1, H, W], True = removed."""
    return upsample_mask(mask, grid, img_size).unsqueeze(1)


def token_places(masks: Masks, grid: tuple[int, int], token_grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`ids_keep` and `ids_restore` of cells on `grid` -> those of the tokens of `token_grid`, cell by cell.

    Returns:
        ids_keep [B, K·s], ids_restore [B, N·s] for s tokens a cell; a token is visible where ids_restore < K·s.
    """
    (rows, columns), (height, width) = (token_grid[0] // grid[0], token_grid[1] // grid[1]), token_grid
    rank = masks.ids_restore.unflatten(1, grid).repeat_interleave(rows, 1).repeat_interleave(columns, 2)
    down, right = (torch.arange(side, device=rank.device) for side in (height, width))
    within = (down % rows)[:, None] * columns + right % columns
    ids_restore = (rank * (rows * columns) + within).flatten(1)
    return inverse_permutation(ids_restore)[:, : masks.ids_keep.shape[1] * rows * columns], ids_restore
