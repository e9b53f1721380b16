"""MixedAE: mixed autoencoder for self-supervised visual representation learning (arXiv 2303.17152)."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastmim.layers import FusedBlock, MaskTokenDecoder
from fastmim.layers.homologous_attention import count_of_ratio, homologous_attention
from fastmim.layers.patch_mix import mix_images
from fastmim.layers.row_index import take_rows
from fastmim.methods.base import Batch, Method, Output, Pictures
from fastmim.methods.mae import init_mae_encoder
from fastmim.methods.masking import cell_grid
from fastmim.methods.reconstruction import patch_pictures
from fastmim.models.encoder import Encoder
from fastmim.models.token_encoder import TokenEncoder
from fastmim.ops import MixingMap, homologous_contrastive, masked_patch_loss, mixing_map, patch_mix, unmix
from fastmim.ops.mixing_map import groups_of
from fastmim.ops.topk_attention import homologous_chance


@dataclass
class MixedAEConfig:
    """Settings of MixedAE; the defaults are the paper's at 224 pixels where it states them, with less decoder for small
    models and images."""

    group_size: int = 4
    """Images that are mixed with each other, G; each shows 1/G of its patches. Divides the batch."""
    mixing: Literal["compose", "full"] = "compose"
    """compose: one mixed sequence a group, at MAE's cost. full: G of them, in which every patch shows once."""
    attention: Literal["topk", "oracle", "global"] = "topk"
    """In the encoder. topk: each patch keeps the patches that fit it best. oracle: it is told which are of its image,
    as in MixMIM. global: plain attention, which the paper finds worse than MAE."""
    topk_ratio: float | None = None
    """Share of the patches that a patch keeps with topk. None: 1/G."""
    homo_layers: tuple[int, ...] | None = None
    """Blocks of the encoder, from 0, whose attention is of that kind. None: all but the first."""
    segment_embedding: Literal["learned", "none"] = "learned"
    """A vector for each index in the group, added to the patches that it shows; used in pre-training only."""
    contrastive_weight: float = 0.1
    """Of the homologous contrastive loss beside the reconstruction; 0 leaves it out."""
    temperature: float = 0.25
    """Of the contrastive loss."""
    projector: Literal["none", "mlp"] = "none"
    """What the encoder's tokens pass through before the contrastive loss."""
    norm_pix_loss: bool = True
    """Predict pixels normalised by the mean and variance of their patch."""
    decoder_dim: int | None = None
    """Width of the decoder. None: 512, or the encoder's width where that is less."""
    decoder_depth: int | None = None
    """Blocks of the decoder. None: 8, or 4 for fewer than 196 patches."""
    decoder_num_heads: int | None = None
    """Heads of the decoder. None: one per 32 channels."""
    exact_pruning: bool = True
    """Leave out decoder work that reaches no loss or that all images share, as in MAE, where G divides the patches."""
    init_encoder: bool = True
    """Give the encoder MAE's initialisation and fixed sin-cos positions; false keeps the weights that it came with."""


class MixedAE(Method):
    """Fill the removed places of an image with patches of other images, and let each patch find its own.

    1. Groups of G neighbours in the (shuffled) batch; a random map M gives each image L/G positions, or one more where
       G does not divide L. Position l of the group's sequence shows patch l of image M[l]: no patch moves.
    2. Patch embedding of the shown patches + fixed 2-D sin-cos positions + segment vector e[M[l]]; one cls a sequence.
    3. Encoder with homologous attention: each head and patch keeps the k = L/G best keys (`topk_attention`; cls attends
       to and is attended by all). It has no parameters: the exported encoder is plain, with the same keys.
    4. Unmix: for each image the encoded tokens that are its own, mask tokens elsewhere, cls copied; MAE's decoder.
    5. L_rec: MAE's loss over the positions that an image does not show.
    6. L_con: supervised contrastive loss between the patch tokens of a sequence, an image being a class.
    7. L = L_rec + λ L_con.

    `recognition` in the log is the share of chosen keys that are of the patch's own image, over heads and homologous
    blocks, beside what chance gives: (L/G - 1)/(L - 1). `mixing: full`, `group_size: 2`, `attention: oracle` is the
    pairing of MixMIM (arXiv 2205.13137) on a ViT: both complementary sequences are encoded, every position predicted.

    There is no official code. What the paper leaves open is a setting here: where segment vectors enter, k, the first
    block, the projector, τ and λ. The contrastive loss is between tokens after the encoder's final norm.
    """

    name: ClassVar[str] = "mixedae"
    Config: ClassVar[type] = MixedAEConfig
    cfg: MixedAEConfig
    encoder: TokenEncoder

    def __init__(self, encoder: Encoder, cfg: MixedAEConfig, img_size: tuple[int, int]) -> None:
        if not isinstance(encoder, TokenEncoder) or not all(type(b) is FusedBlock for b in encoder.blocks):
            raise ValueError(
                f"mixedae: needs the attention blocks of a plain ViT, which {encoder.name or type(encoder).__name__} "
                f"does not have; choose a vit_* model."
            )
        super().__init__(encoder, cfg, img_size)
        self.patch_size = encoder.patch_size
        self.grid = cell_grid(img_size, self.patch_size, "mixedae", "patch_size")
        self.num_patches = self.grid[0] * self.grid[1]
        self.topk_ratio, self.homo_layers = _check(cfg, self.num_patches, len(encoder.blocks))
        dim = cfg.decoder_dim or min(512, encoder.embed_dim)
        self.decoder = MaskTokenDecoder(
            encoder.embed_dim,
            self.grid,
            self.patch_size[0] * self.patch_size[1] * encoder.in_chans,
            num_prefix_tokens=encoder.num_prefix_tokens,
            dim=dim,
            depth=cfg.decoder_depth or (8 if self.num_patches >= 196 else 4),
            num_heads=cfg.decoder_num_heads or max(1, dim // 32),
            share_masked=cfg.exact_pruning,
        )
        if cfg.init_encoder:
            init_mae_encoder(encoder)
        self.segment_embed = None
        if cfg.segment_embedding == "learned":
            self.segment_embed = nn.Parameter(torch.empty(cfg.group_size, encoder.embed_dim))
            nn.init.normal_(self.segment_embed, std=0.02)
        width = encoder.embed_dim
        self.projector: nn.Module = nn.Identity()
        if cfg.projector == "mlp" and cfg.contrastive_weight > 0:
            self.projector = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, batch: Batch) -> Output:
        groups = groups_of(batch.size, self.cfg.group_size, "mixedae")
        mixing = mixing_map(groups, self.cfg.group_size, self.num_patches, batch.rng)
        return self.reconstruct(batch.images, mixing)

    def reconstruct(self, images: Tensor, mixing: MixingMap) -> Output:
        """The step for a given map."""
        self.check_images(images)
        cfg, prefix = self.cfg, self.encoder.num_prefix_tokens
        shown, target = _sequences(images, mixing, cfg.mixing == "full")
        latent, recognition = self.encode(images, mixing, shown.segments)
        prediction = self.decode(latent, shown)
        loss = masked_patch_loss(prediction, target, shown.mask, self.patch_size, norm_pix=cfg.norm_pix_loss)
        parts = {"loss_reconstruction": loss.detach()}
        if cfg.contrastive_weight > 0:
            contrast = homologous_contrastive(
                self.projector(latent[:, prefix:]), shown.segments, cfg.group_size, temperature=cfg.temperature
            )
            parts["loss_contrastive"] = contrast.detach()
            loss = loss + cfg.contrastive_weight * contrast
        if recognition is not None:
            parts["recognition"] = recognition.detach()
            chance = homologous_chance(self.num_patches, cfg.group_size)
            parts["recognition_chance"] = torch.full_like(recognition, chance)
        return Output(loss, parts, functools.partial(self._pictures, images, mixing, prediction.detach()))

    def encode(self, images: Tensor, mixing: MixingMap, segments: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens of the mixed sequences [S, P + L, D] after the final norm, and the recognition accuracy.

        segments [S, L] are the maps of the sequences: those of the groups, or in full mixing all their shifts.
        """
        encoder, cfg, shares = self.encoder, self.cfg, []
        proj = encoder.patch_embed.proj
        tokens = patch_mix(
            images, mixing.segments, proj.weight, proj.bias, encoder.patch_positions(), full=cfg.mixing == "full"
        )
        if self.segment_embed is not None:
            # A product with ones and zeros: its gradient adds up in a fixed order on every device.
            images_of_group = torch.arange(cfg.group_size, device=segments.device)
            owner = segments.unsqueeze(-1) == images_of_group  # F.one_hot reads values back to the host
            tokens = tokens + owner.to(self.segment_embed.dtype) @ self.segment_embed

        def run_block(index: int, block: nn.Module, x: Tensor) -> Tensor:
            assert isinstance(block, FusedBlock)
            x, share = block.run(
                _homologous_block,
                x,
                segments,
                mode=cfg.attention if index in self.homo_layers else "global",
                topk_ratio=self.topk_ratio,
                num_prefix_tokens=encoder.num_prefix_tokens,
                measure=True,
            )
            if share is not None:
                shares.append(share)
            return x

        latent = encoder.encode_patches(tokens, run_block)
        return latent, torch.stack(shares).mean() if shares else None

    def decode(self, latent: Tensor, shown: MixingMap) -> Tensor:
        """Mixed latents [S, P + L, D] -> predictions [S * G, L, values] of every image that a sequence shows."""
        decoder, size, prefix = self.decoder, self.cfg.group_size, self.encoder.num_prefix_tokens
        if self.cfg.exact_pruning and self.num_patches % size == 0:
            ids_keep, ids_restore, _ = shown.masks()
            # Every row of a sequence is one image's, so that this is a permutation of them.
            visible = take_rows(latent[:, prefix:], ids_keep.reshape(latent.shape[0], -1))
            visible = visible.reshape(*ids_keep.shape, -1)
            latent = torch.cat((latent[:, :prefix].repeat_interleave(size, dim=0), visible), dim=1)
            return decoder(latent, ids_restore, removed_only=True)
        token, positions = decoder.mask_token.flatten(), decoder.decoder_pos_embed[0]
        x = unmix(decoder.decoder_embed(latent), shown.segments, size, token, positions, num_prefix_tokens=prefix)
        assert isinstance(x, Tensor)
        for block in decoder.decoder_blocks:
            x = block(x)
        return decoder.decoder_pred(decoder.decoder_norm(x[:, prefix:]))

    def no_weight_decay(self) -> set[str]:
        return set()  # as in MAE: cls and mask token are decayed, the fixed positions are not trained

    def _pictures(self, images: Tensor, mixing: MixingMap, prediction: Tensor) -> Pictures:
        """Each image, the (first) mixed image of its group, and its reconstruction from that one."""
        size, groups = self.cfg.group_size, mixing.segments.shape[0]
        if self.cfg.mixing == "full":
            prediction = prediction.unflatten(0, (groups, size, size))[:, 0].flatten(0, 1)
        pictures = patch_pictures(images, prediction, mixing.mask, self.patch_size, self.cfg.norm_pix_loss)
        pictures.masked = mix_images(images, mixing.segments, self.patch_size).repeat_interleave(size, dim=0)
        return pictures


def _homologous_block(block: FusedBlock, x: Tensor, segments: Tensor, **settings: Any) -> tuple[Tensor, Tensor | None]:
    """A block with `homologous_attention` in place of its own."""
    attended, share = homologous_attention(block.attn, block.norm1(x), segments, **settings)
    return block.finish(x, attended), share


def _sequences(images: Tensor, mixing: MixingMap, full: bool) -> tuple[MixingMap, Tensor]:
    """The maps of all sequences, and the images that each of them is decoded into.

    Full mixing has G sequences a group, so each image is decoded G times, from another 1/G of its patches each time.
    """
    if not full:
        return mixing, images
    size, groups = mixing.group_size, mixing.segments.shape[0]
    shifts = [mixing.shifted(by) for by in range(size)]
    segments = torch.stack([shift.segments for shift in shifts], dim=1).flatten(0, 1)
    mask = torch.stack([shift.mask.unflatten(0, (groups, size)) for shift in shifts], dim=1).flatten(0, 2)
    target = images.unflatten(0, (groups, 1, size)).expand(-1, size, *[-1] * images.dim()).flatten(0, 2)
    return MixingMap(segments, mask), target


def _check(cfg: MixedAEConfig, num_patches: int, depth: int) -> tuple[float, frozenset[int]]:
    """(k relative to the patches, blocks with homologous attention), or ValueError for what cannot work."""
    size = cfg.group_size
    if not 2 <= size <= 8:
        raise ValueError(f"mixedae: group_size is {size}; 2 to 8 images are mixed with each other.")
    if num_patches < 2 * size:
        raise ValueError(
            f"mixedae: {num_patches} patches among {size} images (group_size) leave less than two for each; take "
            f"larger images, smaller patches or smaller groups."
        )
    ratio = 1 / size if cfg.topk_ratio is None else cfg.topk_ratio
    try:
        count_of_ratio(ratio, num_patches)
    except ValueError as error:
        raise ValueError(f"mixedae: {error}.") from None
    if cfg.contrastive_weight < 0 or cfg.temperature <= 0:
        raise ValueError(
            f"mixedae: contrastive_weight is {cfg.contrastive_weight} and temperature {cfg.temperature}; the first may "
            f"not be below 0, the second must be above it."
        )
    layers = range(1, depth) if cfg.homo_layers is None else cfg.homo_layers
    if unknown := [layer for layer in layers if not 0 <= layer < depth]:
        raise ValueError(f"mixedae: homo_layers names block {unknown[0]}, but the encoder has blocks 0 to {depth - 1}.")
    return ratio, frozenset(layers)
