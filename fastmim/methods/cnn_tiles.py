"""What the methods share that compute the visible tiles of a CNN and nothing else.

A cell of the mask is as large as the encoder's total stride, so that removed pixels never mix with visible ones: every
stage is tiles [B, K, t, t, C], with t positions in a cell (8, 4, 2, 1 at strides 4, 8, 16, 32).
"""

from collections.abc import Sequence

from fastmim.layers import SparseModule, sparsify, stage_names
from fastmim.methods.base import size_text
from fastmim.methods.masking import cell_grid
from fastmim.models.encoder import Encoder
from fastmim.models.token_encoder import TokenEncoder

__all__ = ["encoder_on_tiles", "tile_grid"]


def encoder_on_tiles(
    encoder: Encoder, method: str, *, outputs: str | Sequence[str] | None = None, grn_stats: str = "image"
) -> SparseModule:
    """The encoder's own layers, run on visible tiles. Belongs in a tuple, so that weights are not named twice.

    Args:
        outputs: names of the submodules whose outputs are wanted; its four stages when None.

    Raises:
        ValueError: a ViT, or layers that cannot run on tiles.
    """
    if isinstance(encoder, TokenEncoder):
        raise ValueError(
            f"{method}: computes the visible tiles of a CNN, but {encoder.name or type(encoder).__name__} is a ViT; "
            f"choose a resnet*, convnext_* or convnextv2_* model."
        )
    return sparsify(encoder, outputs=stage_names(encoder) if outputs is None else outputs, grn_stats=grn_stats)


def tile_grid(img_size: tuple[int, int], stride: int, method: str) -> tuple[int, int]:
    """(rows, columns) of cells of the encoder's total stride; at least two cells."""
    grid = cell_grid(img_size, (stride, stride), method, "the encoder's stride")
    if grid[0] * grid[1] < 2:
        raise ValueError(
            f"{method}: an image of {size_text(img_size)} pixels is a single cell of the encoder's stride {stride}, so "
            f"nothing could be hidden; give images of {size_text((2 * stride, 2 * stride))} pixels or more."
        )
    return grid
