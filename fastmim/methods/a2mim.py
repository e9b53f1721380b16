"""A²MIM: architecture-agnostic masked image modeling (arXiv 2205.13943)."""

import functools
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastmim.layers import SparseModule
from fastmim.methods.base import Batch, Method, Output, Pictures
from fastmim.methods.cnn_tiles import encoder_on_tiles
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
from fastmim.ops import Masks, TileIndex, frequency_loss, linear, masked_patch_loss, random_mask, scatter_tiles


@dataclass
class FrequencyConfig:
    """The Fourier loss: λ·L_freq, added to the loss in pixel space."""

    weight: float = 0.5
    """λ; 0 leaves the Fourier transform out altogether, as the released ConvNeXt recipes do."""
    form: Literal["paper", "code"] = "paper"
    """Form "paper" compares the spectra of each image. Form "code", which the authors' releases run, compares (with
    `focal`) the mean spectra of the batch of a process, and so depends on its size."""
    focal: bool = True
    """Weigh frequencies by their own error. False: no weights in form "paper"; in form "code" the loss in pixel space
    applied to the spectra of each image."""
    alpha: float = 1.0
    """Exponent of the weight that a frequency gets from its own error."""
    distance: Literal["squared", "modulus"] = "squared"
    """Form "paper" only. With "modulus", alpha 1 and no normalisation the gradient is that of a plain L2 in pixels."""
    normalise: Literal["image_max", "none"] = "image_max"
    """Form "paper" only: divide the weights of an image by their maximum."""
    reduce: Literal["mean", "sum"] = "mean"
    """Form "paper" only: over channels and frequencies; "sum" makes λ depend on the image size."""
    visible_weight: float = 0.0
    """w_f: share of the gradient that visible pixels get (1e-3 in the ResNet recipes)."""
    replacement: Literal["target", "prediction", "mixed", "mean"] | None = None
    """What stands at visible pixels of the predicted image, without gradient. None: "prediction" for form "paper",
    "mixed" (half prediction, half target) for form "code"."""


@dataclass
class A2MIMConfig:
    """Settings of A²MIM; the defaults suit ViT, ResNet and ConvNeXt at any image size."""

    mask_ratio: float = 0.6
    """Removed share of the cells of each image, rounded up to whole cells (30 of 49 at 224 pixels)."""
    mask_patch_size: int | None = None
    """Side of a mask cell in pixels. None: 32, or for images below 192 pixels about a sixth of the short side."""
    mask_layer: int | None = None
    """Where the mask token enters. None: after the patch embedding of a ViT, before stage 4 of a CNN. A number k:
    before block k of a ViT, before stage k + 1 of a CNN."""
    gate: bool | None = None
    """Multiply removed features by a learnable gate before the token is added. None: for CNNs only."""
    gate_init: float = 1e-6
    """Initial value of the gate."""
    detach: bool = False
    """Stop gradients at the removed features."""
    loss: Literal["auto", "l1", "focal_l1"] = "auto"
    """Loss in pixel space. auto: focal L1 for CNNs, L1 for ViT."""
    freq: FrequencyConfig = field(default_factory=FrequencyConfig)
    """The Fourier loss."""
    token_lr_scale: float = 1.0
    """Learning rate of the mask token, as a multiple (0.1 in the CNN recipes)."""
    gate_lr_scale: float = 1.0
    """Learning rate of the gate, as a multiple (0.1 in the 100-epoch ResNet-50 and the ConvNeXt recipes)."""
    exact_pruning: bool = True
    """Leave out work on removed patches that repeats within an image; the result is the same up to rounding. ViT with
    the token after the patch embedding and without gate and detach only, others have no such work."""
    tiles: bool = False
    """Not the paper's: what is before the mask token in a CNN sees visible tiles only, and the token alone fills the
    removed cells from there on. Saves the work on removed cells; they have no features for a gate."""


class A2MIM(Method):
    """Masked pixels become the image's mean colour, a token enters at one layer, pixels and spectra are predicted.

    1. Mask m: ceil(cells·0.6) of the cells of 32 x 32 pixels of each image, nearest-repeated to tokens and pixels.
    2. Fill: removed pixels ← the image's own mean per channel, over all its pixels.
    3. Token, at the insertion point of the encoder (ViT: after the patch embedding, before cls token and positions;
       CNN: before stage 4): ViT x ← x + t·m; CNN x ← x(1−m) + γ·x·m, then x ← x + t·m, with γ from 1e-6.
    4. Head: 1x1 convolution + PixelShuffle gives x̂ at full resolution. Target x: the image before filling.
    5. L_spa = Σ ℓ(x̂ − x)·M / ΣM / C, with ℓ = |e| for ViT and the focal |e|·(2σ(0.2|e|) − 1) for CNNs.
    6. L_freq: see `fastmim.ops.frequency_loss`. Form "paper" is the paper's equation with the choices that keep it from
       being a plain L2 in disguise: squared distance, weights |Δ|^α detached and divided by the image's maximum. Form
       "code" is what the released recipes run: spectra averaged over the batch of a process before the difference, so
       errors of opposite sign in different images cancel, every image receives the same gradient picture, and the loss
       depends on the batch size per process. The recipes use "code", to be comparable with published figures.
    7. L = L_spa + λ·L_freq.

    With `tiles`, an extension of ours for CNNs, masking is SparK's up to the insertion point: removed pixels are not
    filled but left out, layers before the token compute visible cells only (norms over visible positions, zeros for
    convolutions at their borders), and x ← t at removed cells. Layers after it are dense.

    Differs from the authors' code: the known count of removed values replaces ΣM + 1e-5; the Fourier loss is fp32
    under any autocast, and its asserts on the weights (two host synchronisations) are a clamp; t and γ are never
    decayed (their 300-epoch ResNet recipes decay γ, by omission); t is initialised for every encoder (their ConvNeXt
    leaves it at zero, by accident).
    """

    name: ClassVar[str] = "a2mim"
    Config: ClassVar[type] = A2MIMConfig
    cfg: A2MIMConfig

    def __init__(self, encoder: Encoder, cfg: A2MIMConfig, img_size: tuple[int, int]) -> None:
        super().__init__(encoder, cfg, img_size)
        point = encoder.insertion(cfg.mask_layer)
        cell_grid(img_size, (encoder.stride, encoder.stride), "a2mim", "the encoder's stride")
        self.cell = check_cell(cfg.mask_patch_size, img_size, point.stride, "a2mim")
        self.grid = cell_grid(img_size, (self.cell, self.cell), "a2mim", "mask_patch_size")
        self.num_cells = self.grid[0] * self.grid[1]
        self.num_keep = count_kept(self.num_cells, cfg.mask_ratio, "ceil", "a2mim")
        self.token_grid = (img_size[0] // point.stride, img_size[1] // point.stride)
        is_cnn = point.layout == "map"
        gated = (is_cnn and not cfg.tiles) if cfg.gate is None else cfg.gate
        self._on_tiles: tuple[SparseModule, ...] = ()
        if cfg.tiles:
            if gated or cfg.detach:
                option = "gate" if gated else "detach"
                raise ValueError(
                    f"a2mim: method.tiles computes no features at removed cells; leave out method.{option}."
                )
            before = encoder.module_before(cfg.mask_layer) if is_cnn else None
            self._on_tiles = (encoder_on_tiles(encoder, "a2mim with method.tiles", outputs=before),)
        gate = cfg.gate_init if gated else None
        self.mask_token = MaskToken(point.channels, point.layout, replace=False, gate=gate, detach=cfg.detach)
        first = isinstance(encoder, TokenEncoder) and not cfg.mask_layer
        self.prunes = cfg.exact_pruning and first and gate is None and not cfg.detach
        self.head = PixelHead(encoder.num_features, encoder.stride, encoder.in_chans)
        _check_frequency(cfg.freq)
        self.loss: Literal["l1", "focal_l1"] = cfg.loss if cfg.loss != "auto" else "focal_l1" if is_cnn else "l1"

    def forward(self, batch: Batch) -> Output:
        return self.predict_removed(batch.images, random_mask(batch.size, self.num_cells, self.num_keep, batch.rng))

    def predict_removed(self, images: Tensor, masks: Masks, target: Tensor | None = None) -> Output:
        """The step for given masks; `target` is `images` unless a test tells them apart."""
        self.check_images(images)
        target = images if target is None else target
        removed = removed_pixels(masks.mask, self.grid, self.img_size)
        prediction = self.head(self.features(images, masks, removed))
        spatial = masked_patch_loss(prediction, target, masks.mask, self.cell, loss=self.loss)
        loss, parts = spatial, {"loss_spatial": spatial.detach()}
        if self.cfg.freq.weight != 0.0:
            frequency = self.frequency(prediction, target, masks.mask)
            loss = spatial + self.cfg.freq.weight * frequency
            parts["loss_frequency"] = frequency.detach()
        shown = functools.partial(_pictures, target, images, prediction.detach(), removed, bool(self._on_tiles))
        return Output(loss, parts, shown)

    def features(self, images: Tensor, masks: Masks, removed: Tensor) -> Tensor:
        """The last map: of a filled image with the token, or of visible tiles."""
        if self._on_tiles:
            return self.features_on_tiles(images, masks)
        if self.prunes:
            return self.features_once(images, masks)
        filled = mean_fill(images, removed)
        insert = functools.partial(self.mask_token, removed=removed_tokens(masks.mask, self.grid, self.token_grid))
        return self.encoder.forward_map(filled, insert, self.cfg.mask_layer)

    def features_once(self, images: Tensor, masks: Masks) -> Tensor:
        """The same without filling: removed patches of an image are all its mean colour, so one of them is embedded."""
        assert isinstance(self.encoder, TokenEncoder)
        embed = self.encoder.patch_embed.proj
        colour = linear(images.mean(dim=(2, 3)), embed.weight.sum(dim=(2, 3)), embed.bias)  # [B, D]
        token = (colour + self.mask_token.token).unsqueeze(1)
        return self.encoder.forward_replaced(images, token, *token_places(masks, self.grid, self.token_grid))

    def features_on_tiles(self, images: Tensor, masks: Masks) -> Tensor:
        """The last map; visible cells alone up to the token."""
        tiles = TileIndex.from_ids_keep(masks.ids_keep, self.grid)
        visible = self._on_tiles[0](images, tiles)
        return self.encoder.forward_from(scatter_tiles(visible, tiles, self.mask_token.token), self.cfg.mask_layer)

    def frequency(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """L_freq, without its weight λ."""
        freq = self.cfg.freq
        return frequency_loss(
            prediction,
            target,
            mask,
            self.cell,
            form=freq.form,
            focal=freq.focal,
            alpha=freq.alpha,
            distance=freq.distance,
            normalise=freq.normalise,
            reduce=freq.reduce,
            visible_weight=freq.visible_weight,
            replacement=freq.replacement or {"paper": "prediction", "code": "mixed"}[freq.form],
            spatial=self.loss,
        )

    def runs_in_layers(self) -> tuple[nn.Module, ...]:
        return (self.encoder,) if self._on_tiles else ()

    def lr_scales(self) -> dict[str, float]:
        scales = {"mask_token.token": self.cfg.token_lr_scale, "mask_token.gate": self.cfg.gate_lr_scale}
        present = dict(self.named_parameters())
        return {name: scale for name, scale in scales.items() if name in present and scale != 1.0}


def mean_fill(images: Tensor, removed: Tensor) -> Tensor:
    """Removed pixels become the image's mean per channel over all pixels. removed: bool [B, 1, H, W]."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    return torch.where(removed, mean, images)


def _check_frequency(freq: FrequencyConfig) -> None:
    """Refuse settings that contradict each other before a step is made."""
    if not 0.0 <= freq.weight < math.inf:
        raise ValueError(f"a2mim: freq.weight is λ, zero or a positive number; got {freq.weight}.")
    if not 0.0 <= freq.visible_weight <= 1.0:
        raise ValueError(f"a2mim: freq.visible_weight is a share, between 0 and 1; got {freq.visible_weight}.")
    if freq.form == "code" and (freq.distance, freq.normalise, freq.reduce) != ("squared", "image_max", "mean"):
        raise ValueError(
            f"a2mim: freq.distance, freq.normalise and freq.reduce belong to form 'paper', but form 'code' was given "
            f"with {freq.distance!r}, {freq.normalise!r} and {freq.reduce!r}; drop them or choose form 'paper'."
        )


def _pictures(original: Tensor, images: Tensor, prediction: Tensor, removed: Tensor, on_tiles: bool) -> Pictures:
    masked = images.masked_fill(removed, 0.0) if on_tiles else mean_fill(images, removed)
    reconstruction = prediction.to(original.dtype).where(removed, original)
    return Pictures(original=original, masked=masked, reconstruction=reconstruction)
