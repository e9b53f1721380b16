"""SparK: sparse and hierarchical masked modeling for CNNs (arXiv 2301.03580)."""

import functools
import logging
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from fastmim.layers import MaskedBatchNorm2d, MaskedLayerNorm2d
from fastmim.methods.base import Batch, Method, Output
from fastmim.methods.cnn_tiles import encoder_on_tiles, tile_grid
from fastmim.methods.masking import count_kept
from fastmim.methods.reconstruction import patch_pictures
from fastmim.models.encoder import Encoder
from fastmim.models.fcmae_decoder import FCMAEDecoder
from fastmim.models.norms import synchronise_batch_norms
from fastmim.models.spark_decoder import SparKDecoder
from fastmim.ops import Masks, TileIndex, masked_patch_loss, random_mask

logger = logging.getLogger(__name__)


@dataclass
class SparKConfig:
    """Settings of SparK; the defaults are the paper's."""

    mask_ratio: float = 0.6
    """Removed share of the cells of each image; round(N·(1 - ratio)) are kept (20 of 49 at 224 pixels)."""
    decoder: Literal["full", "light"] = "full"
    """full: the paper's, over the maps of all four stages (12 GMAC at 224 pixels, more than a ResNet-50). light: not
    the paper's; FCMAE's single block over the last map (0.2 GMAC), for twice the speed."""
    decoder_width: int | None = None
    """Width of the decoder at its deepest level. None: 768 for full, 512 for light, or the encoder's where less."""
    sync_bn: bool = True
    """In a run of several processes, batch norms take their statistics over all of them, on any device (the decoder's
    too), as the authors' SyncBN. False: each process over its own images."""


class SparK(Method):
    """Compute the visible tiles of a CNN only, fill up the maps of all stages, predict pixels through a U-Net.

    1. Cells of 32 x 32 pixels, the encoder's total stride; K = round(N·(1 − ratio)) are kept, 20 of 49.
    2. Encoder on tiles: every convolution sees zeros at removed cells and is not computed there; batch norms take their
       statistics over visible positions. The same weights, run densely, are what is exported.
    3. Each of the four stages: a norm over visible positions (batch norm for ResNet, layer norm for ConvNeXt), a mask
       embedding of its own at removed cells, a projection to the decoder's width. See `fastmim.models.spark_decoder`.
    4. Decoder, deepest stage first: x ← block(x + stage), five doublings of the side, 1x1 convolution to pixels.
    5. Target: (x − mean)/sqrt(unbiased variance + 1e-6) per cell. L = mean squared error over removed cells, in fp32.

    Differs from the authors' code: nothing is computed at removed cells of the encoder (theirs multiplies by a mask);
    masks are arguments, not globals; rectangular images work. `decoder: light` is an option of ours.
    """

    name: ClassVar[str] = "spark"
    Config: ClassVar[type] = SparKConfig
    cfg: SparKConfig

    def __init__(self, encoder: Encoder, cfg: SparKConfig, img_size: tuple[int, int]) -> None:
        super().__init__(encoder, cfg, img_size)
        on_tiles = encoder_on_tiles(encoder, "spark")
        self._on_tiles = (on_tiles,)
        self.cell = encoder.stride
        self.grid = tile_grid(img_size, self.cell, "spark")
        self.num_cells = self.grid[0] * self.grid[1]
        self.num_keep = count_kept(self.num_cells, cfg.mask_ratio, "round", "spark")
        batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
        channels = [stage.channels for stage in on_tiles.outputs]
        self.decoder: SparKDecoder | LightDecoder
        if cfg.decoder == "full":
            self.decoder = SparKDecoder(
                channels,
                [stage.stride for stage in on_tiles.outputs],
                width=cfg.decoder_width or _width(768, encoder),
                out_chans=encoder.in_chans,
                batch_norm=batch_norm,
            )
        else:
            logger.info("spark: light decoder, one ConvNeXt V2 block over the last stage; the paper's is decoder=full.")
            norm = MaskedBatchNorm2d(channels[-1]) if batch_norm else MaskedLayerNorm2d(channels[-1])
            values = self.cell * self.cell * encoder.in_chans
            self.decoder = LightDecoder(
                norm, FCMAEDecoder(channels[-1], values, dim=cfg.decoder_width or _width(512, encoder))
            )
        if cfg.sync_bn:
            # At the deepest stage only K positions of an image are visible, so one process alone has few of them.
            synchronise_batch_norms(self)

    def forward(self, batch: Batch) -> Output:
        return self.predict_removed(batch.images, random_mask(batch.size, self.num_cells, self.num_keep, batch.rng))

    def predict_removed(self, images: Tensor, masks: Masks, target: Tensor | None = None) -> Output:
        """The step for given masks; `target` is `images` unless a test tells them apart."""
        self.check_images(images)
        target = images if target is None else target
        tiles = TileIndex.from_ids_keep(masks.ids_keep, self.grid)
        prediction = self.decoder(self._on_tiles[0](images, tiles), tiles)
        loss = masked_patch_loss(prediction, target, masks.mask, self.cell, norm_pix=True)
        cell = (self.cell, self.cell)
        return Output(
            loss, pictures=functools.partial(patch_pictures, target, prediction.detach(), masks.mask, cell, True)
        )

    def runs_in_layers(self) -> tuple[nn.Module, ...]:
        return (self.encoder,)

    def no_weight_decay(self) -> set[str]:
        """As the official run: tokens too."""
        tokens = {name for name, _ in self.named_parameters() if name.endswith("mask_token")}
        return super().no_weight_decay() | tokens


def _width(wanted: int, encoder: Encoder) -> int:
    """At most the encoder's, and something that five levels can halve."""
    return max(min(wanted, encoder.num_features) // 32, 1) * 32


class LightDecoder(nn.Module):
    """A norm over the visible positions of the last stage, then FCMAE's decoder."""

    def __init__(self, norm: MaskedBatchNorm2d | MaskedLayerNorm2d, decoder: FCMAEDecoder) -> None:
        super().__init__()
        self.norm = norm
        self.decoder = decoder

    def forward(self, stages: tuple[Tensor, ...], tiles: TileIndex) -> Tensor:
        """Stages, finest first, each [B, K, t, t, C] -> [B, N, p*q*channels]."""
        return self.decoder(self.norm(stages[-1], tiles), tiles)
