"""SimMIM: a simple framework for masked image modeling (arXiv 2111.09886)."""

import functools
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastmim.methods.base import Batch, Method, Output, Pictures
from fastmim.methods.masking import (
    cell_grid,
    check_cell,
    count_kept,
    removed_pixels,
    removed_tokens,
    token_places,
)
from fastmim.models.encoder import Encoder
from fastmim.models.mask_token import MaskToken
from fastmim.models.pixel_head import PixelHead
from fastmim.models.token_encoder import TokenEncoder
from fastmim.ops import Masks, masked_patch_loss, random_mask


@dataclass
class SimMIMConfig:
    """Settings of SimMIM; the defaults are the paper's at 192 and 224 pixels, and fit themselves to smaller images."""

    mask_ratio: float = 0.6
    """Removed share of the cells of each image, rounded up to whole cells (30 of 49 at 224 pixels)."""
    mask_patch_size: int | None = None
    """Side of a mask cell in pixels. None: 32, or for images below 192 pixels about a sixth of the short side."""
    mask_layer: int = 0
    """Where the token replaces features: 0 is right after the patch embedding of a ViT or the stem of a CNN; k is
    before block k of a ViT or stage k + 1 of a CNN (which has seen removed pixels until there)."""
    exact_pruning: bool = True
    """Leave out work on removed patches that all images share; the result is the same up to rounding. ViT with
    mask_layer 0 only, other encoders have no such work."""


class SimMIM(Method):
    """Mask, replace, encode everything, predict raw pixels with one linear layer.

    1. Cells of 32 x 32 pixels are removed: ceil(cells·0.6) of each image, nearest-repeated to the token grid.
    2. x ← x(1−m) + t·m right after the patch embedding, before cls token and positions: a learnable t in place of
       removed tokens. The encoder computes all N tokens.
    3. Head: 1x1 convolution + PixelShuffle to the full image. Target: the normalised image, no per-patch normalisation.
    4. L = Σ|x̂ − x|·M / ΣM / C over removed pixels.

    Differs from the authors' code: the known count of removed values replaces ΣM + 1e-5 (equal to 1e-9 in relative
    terms); t is stored [C], so it is not decayed. CNN encoders follow A²MIM's SimMIM baseline, with replacement after
    the stem by default, because a later stage has already mixed removed pixels into their neighbours.
    """

    name: ClassVar[str] = "simmim"
    Config: ClassVar[type] = SimMIMConfig
    cfg: SimMIMConfig

    def __init__(self, encoder: Encoder, cfg: SimMIMConfig, img_size: tuple[int, int]) -> None:
        super().__init__(encoder, cfg, img_size)
        point = encoder.insertion(cfg.mask_layer)
        cell_grid(img_size, (encoder.stride, encoder.stride), "simmim", "the encoder's stride")
        self.cell = check_cell(cfg.mask_patch_size, img_size, point.stride, "simmim")
        self.grid = cell_grid(img_size, (self.cell, self.cell), "simmim", "mask_patch_size")
        self.num_cells = self.grid[0] * self.grid[1]
        self.num_keep = count_kept(self.num_cells, cfg.mask_ratio, "ceil", "simmim")
        self.token_grid = (img_size[0] // point.stride, img_size[1] // point.stride)
        self.mask_token = MaskToken(point.channels, point.layout, replace=True)
        self.head = PixelHead(encoder.num_features, encoder.stride, encoder.in_chans)

    def forward(self, batch: Batch) -> Output:
        return self.predict_removed(batch.images, random_mask(batch.size, self.num_cells, self.num_keep, batch.rng))

    def predict_removed(self, images: Tensor, masks: Masks, target: Tensor | None = None) -> Output:
        """The step for given masks; `target` is `images` unless a test tells them apart."""
        self.check_images(images)
        target = images if target is None else target
        prediction = self.head(self.features(images, masks))
        loss = masked_patch_loss(prediction, target, masks.mask, self.cell, loss="l1")
        removed = removed_pixels(masks.mask, self.grid, self.img_size)
        return Output(loss, pictures=functools.partial(_pictures, target, prediction.detach(), removed))

    def features(self, images: Tensor, masks: Masks) -> Tensor:
        """The last map, with the token in place of what is removed."""
        if self.cfg.exact_pruning and self.cfg.mask_layer == 0 and isinstance(self.encoder, TokenEncoder):
            places = token_places(masks, self.grid, self.token_grid)
            return self.encoder.forward_replaced(images, self.mask_token.token, *places)
        insert = functools.partial(self.mask_token, removed=removed_tokens(masks.mask, self.grid, self.token_grid))
        return self.encoder.forward_map(images, insert, self.cfg.mask_layer)


def _pictures(original: Tensor, prediction: Tensor, removed: Tensor) -> Pictures:
    return Pictures(
        original=original,
        masked=original.masked_fill(removed, 0.0),
        reconstruction=prediction.to(original.dtype).where(removed, original),
    )
