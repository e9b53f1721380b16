"""FCMAE: fully convolutional masked autoencoders, the pre-training of ConvNeXt V2 (arXiv 2301.00808)."""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from fastmim.methods.base import Batch, Method, Output
from fastmim.methods.cnn_tiles import encoder_on_tiles, tile_grid
from fastmim.methods.masking import count_kept
from fastmim.methods.reconstruction import patch_pictures
from fastmim.models.encoder import Encoder
from fastmim.models.fcmae_decoder import FCMAEDecoder
from fastmim.models.norms import synchronise_batch_norms
from fastmim.ops import Masks, TileIndex, masked_patch_loss, random_mask


@dataclass
class FCMAEConfig:
    """Settings of FCMAE; the defaults are the paper's."""

    mask_ratio: float = 0.6
    """Removed share of the cells of each image; int(N·(1 - ratio)) are kept (19 of 49 at 224 pixels)."""
    norm_pix_loss: bool = True
    """Predict pixels normalised by the mean and variance of their cell."""
    decoder_dim: int = 512
    """Width of the decoder."""
    decoder_depth: int = 1
    """ConvNeXt V2 blocks of the decoder."""
    grn_stats: Literal["image", "batch"] = "image"
    """What the encoder's global response norms take their norms over: the visible part of each image, as fine-tuning
    does, or of the whole batch, as the authors' pre-training code does (for comparisons with their weights)."""
    sync_bn: bool = True
    """In a run of several processes, batch norms take their statistics over all of them, on any device, where the
    encoder has batch norms (a ResNet). False: each process over its own images."""


class FCMAE(Method):
    """Compute the visible tiles of a CNN only, decode by one dense block, predict the pixels of the removed cells.

    1. Cells of 32 x 32 pixels, the encoder's total stride; K = int(N·(1 − ratio)) are kept, 19 of 49.
    2. Encoder on tiles: every convolution sees zeros at removed cells and is not computed there; norms, among them the
       global response norm, see visible positions only. The same weights, run densely, are what is exported.
    3. Decoder: 1x1 convolution to its width, a mask token at removed cells, one dense ConvNeXt V2 block, 1x1
       convolution to p·q·C values. See `fastmim.models.fcmae_decoder`.
    4. Target: pixels, with `norm_pix_loss` (x − mean)/sqrt(unbiased variance + 1e-6) per cell.
    5. L = Σ(mean squared error of a cell)·mask / Σ mask, in fp32.

    Differs from the authors' code: the global response norm is per image while pre-training too (theirs is over the
    batch, a difference to fine-tuning; `grn_stats`); a visible feature that is exactly zero stays visible; all weights
    begin truncated normal with σ 0.02 (theirs initialises some convolutions with σ 1); scale and shift of the response
    norm are one-dimensional here and so not decayed; rectangular images work, and every CNN that `sparsify` takes.
    """

    name: ClassVar[str] = "fcmae"
    Config: ClassVar[type] = FCMAEConfig
    cfg: FCMAEConfig

    def __init__(self, encoder: Encoder, cfg: FCMAEConfig, img_size: tuple[int, int]) -> None:
        super().__init__(encoder, cfg, img_size)
        self._on_tiles = (encoder_on_tiles(encoder, "fcmae", grn_stats=cfg.grn_stats),)
        self.cell = encoder.stride
        self.grid = tile_grid(img_size, self.cell, "fcmae")
        self.num_cells = self.grid[0] * self.grid[1]
        self.num_keep = count_kept(self.num_cells, cfg.mask_ratio, "floor", "fcmae")
        values = self.cell * self.cell * encoder.in_chans
        self.decoder = FCMAEDecoder(encoder.num_features, values, dim=cfg.decoder_dim, depth=cfg.decoder_depth)
        if cfg.sync_bn:
            synchronise_batch_norms(self)

    def forward(self, batch: Batch) -> Output:
        return self.predict_removed(batch.images, random_mask(batch.size, self.num_cells, self.num_keep, batch.rng))

    def predict_removed(self, images: Tensor, masks: Masks, target: Tensor | None = None) -> Output:
        """The step for given masks; `target` is `images` unless a test tells them apart."""
        self.check_images(images)
        target = images if target is None else target
        tiles = TileIndex.from_ids_keep(masks.ids_keep, self.grid)
        prediction = self.decoder(self._on_tiles[0](images, tiles)[-1], tiles)
        loss = masked_patch_loss(prediction, target, masks.mask, self.cell, norm_pix=self.cfg.norm_pix_loss)
        cell = (self.cell, self.cell)
        return Output(
            loss,
            pictures=functools.partial(
                patch_pictures, target, prediction.detach(), masks.mask, cell, self.cfg.norm_pix_loss
            ),
        )

    def runs_in_layers(self) -> tuple[nn.Module, ...]:
        return (self.encoder,)

    def load_official(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a checkpoint of the official code (the value of its "model" entry): see `official_weights`.

        What a checkpoint leaves out as a whole keeps its values here: the decoder, the norm before the classifier.
        Anything else that is missing, and anything unexpected, is an error.
        """
        own = self.state_dict()
        mapped = official_weights(state_dict)
        mapped = {key: value.reshape(own[key].shape) if key in own else value for key, value in mapped.items()}
        optional = [part for part in ("decoder.", "encoder.head.") if not any(key.startswith(part) for key in mapped)]
        kept = {key: value for key, value in own.items() if key.startswith(tuple(optional))}
        self.load_state_dict({**kept, **mapped}, strict=True)


_DENSE_NAMES = (  # official name of the dense network -> timm's; the first that matches counts
    (r"downsample_layers\.0\.(\d)\.", r"stem.\1."),
    (r"downsample_layers\.(\d)\.(\d)\.", r"stages.\1.downsample.\2."),
    (r"stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"norm\.", "head.norm."),
    (r"head\.", "head.fc."),
)
_BLOCK_NAMES = (  # inside a block
    ("dwconv.", "conv_dw."),
    ("pwconv1.", "mlp.fc1."),
    ("pwconv2.", "mlp.fc2."),
    ("grn.gamma", "mlp.grn.weight"),
    ("grn.beta", "mlp.grn.bias"),
)


def official_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the official FCMAE under the names here.

    Two kinds of files exist. Training checkpoints hold `encoder.*` of a MinkowskiEngine network, `proj`, `mask_token`,
    `decoder.0` and `pred`; the released weights hold the encoder alone, already dense, without prefix.

    | official | here |
    |---|---|
    | `encoder.X`, or X where there is no prefix | `encoder.X`, further renamed: |
    | `downsample_layers.0.J` | `stem.J` |
    | `downsample_layers.I.J` | `stages.I.downsample.J` |
    | `stages.I.J` | `stages.I.blocks.J` |
    | `dwconv`, `pwconv1`, `pwconv2` | `conv_dw`, `mlp.fc1`, `mlp.fc2` |
    | `grn.gamma`, `grn.beta` | `mlp.grn.weight`, `mlp.grn.bias` |
    | `X.ln.weight`, `X.linear.weight` (wrappers of Minkowski layers) | `X.weight` |
    | `X.kernel` [k*k, C] (depthwise), [k*k, in, out]; down columns | `X.weight` [C, 1, k, k], [out, in, k, k] |
    | biases [1, C], `gamma` and `beta` [1, C] or [1, 1, 1, C] | [C] |
    | `proj`, `mask_token`, `pred` | `decoder.proj`, `decoder.mask_token`, `decoder.pred` |
    | `decoder.J.Y` | `decoder.blocks.J.Y`, Y renamed as in a block of the encoder |
    """
    return dict(_official_entry(key, value) for key, value in state_dict.items())


def _official_entry(key: str, value: Tensor) -> tuple[str, Tensor]:
    key = re.sub(r"\.(ln|linear)\.(?=weight$|bias$)", ".", key)
    if key.endswith(".kernel"):
        key, value = key.removesuffix("kernel") + "weight", _dense_kernel(value)
    if key.endswith((".bias", ".gamma", ".beta")):
        value = value.flatten()
    if key.startswith(("proj.", "pred.")) or key == "mask_token":
        return f"decoder.{key}", value
    if key.startswith("decoder."):
        prefix, key = "decoder.blocks.", key.removeprefix("decoder.")
    else:
        prefix, key = "encoder.", key.removeprefix("encoder.")
        for pattern, name in _DENSE_NAMES:
            key, count = re.subn(f"^{pattern}", name, key)
            if count:
                break
    for old, new in _BLOCK_NAMES:
        key = key.replace(old, new)
    return prefix + key, value


def _dense_kernel(kernel: Tensor) -> Tensor:
    """MinkowskiEngine's [k*k, C] or [k*k, in, out] to [C, 1, k, k] or [out, in, k, k]; it counts down columns."""
    side = math.isqrt(kernel.shape[0])
    by_column = kernel.unflatten(0, (side, side))  # [column, row, ...]
    if kernel.dim() == 2:
        return by_column.permute(2, 1, 0).unsqueeze(1).contiguous()
    return by_column.permute(3, 2, 1, 0).contiguous()
