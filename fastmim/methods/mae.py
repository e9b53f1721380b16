"""MAE: masked autoencoders are scalable vision learners (arXiv 2111.06377)."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastmim.layers import MaskTokenDecoder
from fastmim.layers.mask_token_decoder import init_mae_linear
from fastmim.layers.sincos_positions import sincos_positions
from fastmim.methods.base import Batch, Method, Output
from fastmim.methods.masking import cell_grid, count_kept
from fastmim.methods.reconstruction import patch_pictures
from fastmim.models.cross_decoder import CrossDecoder
from fastmim.models.encoder import Encoder
from fastmim.models.partial_decoder import PartialDecoder
from fastmim.models.token_encoder import TokenEncoder
from fastmim.ops import Masks, masked_patch_loss, random_mask


@dataclass
class MAEConfig:
    """Settings of MAE; the defaults are the paper's at 224 pixels, with less decoder for small models and images."""

    mask_ratio: float = 0.75
    """Removed share of the patches of each image; int(N·(1 - ratio)) are kept (49 of 196)."""
    norm_pix_loss: bool = True
    """Predict pixels normalised by the mean and variance of their patch."""
    decoder: Literal["full", "partial", "cross"] = "full"
    """Form "full" is the paper's. "partial" decodes a part of the removed patches (arXiv 2411.15746). "cross" is
    CrossMAE's (arXiv 2401.14391): removed patches read the encoder's feature maps by cross-attention only."""
    decode_ratio: float | None = None
    """Share of the removed patches that are decoded and enter the loss, not in form "full". None: a half in form
    "partial", a third in form "cross"."""
    cross_feature_maps: bool = True
    """Form "cross": each block reads its own learned sum of the feature maps of all blocks of the encoder; false: all
    read its output."""
    decoder_dim: int | None = None
    """Width of the decoder. None: 512, or the encoder's width where that is less."""
    decoder_depth: int | None = None
    """Blocks of the decoder. None: 8 (12 in form "cross"), or 4 for fewer than 196 patches."""
    decoder_num_heads: int | None = None
    """Heads of the decoder. None: one per 32 channels."""
    exact_pruning: bool = True
    """Leave out decoder work that reaches no loss or that all images share; the result is the same up to rounding."""
    init_encoder: bool = True
    """Give the encoder MAE's initialisation and fixed sin-cos positions; false keeps the weights that it came with."""


class MAE(Method):
    """Encode only the visible patches, decode all, predict the pixels of the removed ones.

    1. Patch embedding + fixed 2-D sin-cos positions (cls position 0).
    2. K = int(N·(1 − ratio)) patches are kept, the same number in every image: 49 of 196.
    3. cls + K tokens through the encoder; final norm.
    4. Decoder: Linear to its width; mask tokens fill the removed places; + fixed positions; blocks; norm; Linear to
       p·q·C values, channel last. See `fastmim.layers.mask_token_decoder`.
    5. Target: pixels, with `norm_pix_loss` (x − mean)/sqrt(unbiased variance + 1e-6) per patch over its p·q·C values.
    6. L = Σ(mean squared error of a patch)·mask / Σ mask, in fp32.

    Differs from the authors' code: masks come from a counter-based generator instead of the global one; rectangular
    images and patches work; no NaN from a constant patch. As there, cls and mask token are decayed (they are 3-D) and
    positions are not trained. Two published cheaper decoders are options, with a loss over fewer patches.
    """

    name: ClassVar[str] = "mae"
    Config: ClassVar[type] = MAEConfig
    cfg: MAEConfig
    encoder: TokenEncoder

    def __init__(self, encoder: Encoder, cfg: MAEConfig, img_size: tuple[int, int]) -> None:
        if not isinstance(encoder, TokenEncoder):
            raise ValueError(
                f"mae: drops patches before the encoder, which a ViT allows but "
                f"{encoder.name or type(encoder).__name__} does not; choose a vit_* model, or the method a2mim."
            )
        super().__init__(encoder, cfg, img_size)
        self.patch_size = encoder.patch_size
        self.grid = cell_grid(img_size, self.patch_size, "mae", "patch_size")
        self.num_patches = self.grid[0] * self.grid[1]
        self.num_keep = count_kept(self.num_patches, cfg.mask_ratio, "floor", "mae")
        self.num_decoded = _count_decoded(self.num_patches - self.num_keep, cfg)
        self.decoder = self._build_decoder()
        if cfg.init_encoder:
            init_mae_encoder(encoder)

    def _build_decoder(self) -> nn.Module:
        encoder, cfg = self.encoder, self.cfg
        dim = cfg.decoder_dim or min(512, encoder.embed_dim)
        values = self.patch_size[0] * self.patch_size[1] * encoder.in_chans
        deep = 12 if cfg.decoder == "cross" else 8
        blocks: dict[str, Any] = {
            "dim": dim,
            "depth": cfg.decoder_depth or (deep if self.num_patches >= 196 else 4),
            "num_heads": cfg.decoder_num_heads or max(1, dim // 32),
        }
        if cfg.decoder == "cross":
            maps = 1 + len(encoder.blocks) if cfg.cross_feature_maps else 0
            decoded = {"num_decoded": self.num_decoded, "num_feature_maps": maps}
            return CrossDecoder(encoder.embed_dim, self.grid, values, **decoded, **blocks)
        blocks |= {"num_prefix_tokens": encoder.num_prefix_tokens, "share_masked": cfg.exact_pruning}
        if cfg.decoder == "partial":
            return PartialDecoder(encoder.embed_dim, self.grid, values, num_decoded=self.num_decoded, **blocks)
        return MaskTokenDecoder(encoder.embed_dim, self.grid, values, **blocks)

    def forward(self, batch: Batch) -> Output:
        return self.predict_removed(batch.images, random_mask(batch.size, self.num_patches, self.num_keep, batch.rng))

    def predict_removed(self, images: Tensor, masks: Masks, target: Tensor | None = None) -> Output:
        """The step for given masks; `target` is `images` unless a test tells them apart."""
        self.check_images(images)
        target = images if target is None else target
        prediction = self.predict(images, masks)
        counted = masks.mask
        if self.num_decoded < self.num_patches - self.num_keep:
            counted = counted & (masks.ids_restore < self.num_keep + self.num_decoded)
        loss = masked_patch_loss(prediction, target, counted, self.patch_size, norm_pix=self.cfg.norm_pix_loss)
        return Output(
            loss,
            pictures=functools.partial(
                patch_pictures, target, prediction.detach(), masks.mask, self.patch_size, self.cfg.norm_pix_loss
            ),
        )

    def predict(self, images: Tensor, masks: Masks) -> Tensor:
        """[B, N, p·q·C]; only the rows of decoded patches mean something."""
        if self.cfg.decoder != "cross":
            latent = self.encoder.forward_visible(images, masks.ids_keep)
            return self.decoder(latent, masks.ids_restore, removed_only=self.cfg.exact_pruning)
        maps = self.cfg.cross_feature_maps
        encode = self.encoder.forward_visible_maps if maps else self.encoder.forward_visible
        return self.decoder(encode(images, masks.ids_keep), masks.ids_restore, num_visible=self.num_keep)

    def no_weight_decay(self) -> set[str]:
        return set()  # the official run decays cls and mask token; the fixed positions are not trained

    def load_official(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a checkpoint of the official code (the value of its "model" entry), strictly.

        Keys of the decoder (`decoder_*`, `mask_token`) go to `decoder.`, all others (`cls_token`, `pos_embed`,
        `patch_embed.proj`, `blocks.i...`, `norm`) to `encoder.`. A checkpoint without a decoder leaves ours as it is.
        """
        mapped = {official_key(key): value for key, value in state_dict.items()}
        has_decoder = any(key.startswith("decoder.") for key in mapped)
        own = {} if has_decoder else {k: v for k, v in self.state_dict().items() if k.startswith("decoder.")}
        self.load_state_dict({**own, **mapped}, strict=True)


def _count_decoded(removed: int, cfg: MAEConfig) -> int:
    """Removed patches that are decoded, of `removed`."""
    ratio = cfg.decode_ratio
    if cfg.decoder == "full":
        if ratio is not None:
            raise ValueError(
                f"mae: decode_ratio {ratio} leaves out patches, which decoder 'full' does not; choose decoder "
                f"'partial' or 'cross'."
            )
        return removed
    ratio = {"partial": 1 / 2, "cross": 1 / 3}[cfg.decoder] if ratio is None else ratio
    if not 0.0 < ratio <= 1.0:
        raise ValueError(f"mae: decode_ratio is a share of the removed patches, above 0 and at most 1; got {ratio}.")
    return max(1, round(removed * ratio))


def official_key(key: str) -> str:
    """The name here of a parameter of the official MAE."""
    return f"decoder.{key}" if key.startswith("decoder_") or key == "mask_token" else f"encoder.{key}"


@torch.no_grad()
def init_mae_encoder(encoder: TokenEncoder) -> None:
    """The official initialisation: linear layers and flattened patch embedding xavier-uniform, tokens normal σ 0.02,
    positions sin-cos and fixed."""
    encoder.apply(init_mae_linear)
    nn.init.xavier_uniform_(encoder.patch_embed.proj.weight.flatten(1))
    for token in (encoder.cls_token, encoder.reg_token):
        if token is not None:
            nn.init.normal_(token, std=0.02)
    if encoder.pos_embed is not None:
        prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
        encoder.pos_embed.copy_(sincos_positions(encoder.embed_dim, encoder.grid_size, prefix))
        encoder.pos_embed.requires_grad_(False)
