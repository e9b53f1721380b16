"""The plain twin of one of our methods: same architecture, same weights, so that both give the same loss for a mask."""

from typing import Any

import torch
from torch import nn

from benchmarks.baselines import fcmae, spark
from benchmarks.baselines.a2mim import PlainA2MIM, focal_l1, l1
from benchmarks.baselines.convnext import PlainConvNeXt
from benchmarks.baselines.mae import Decoder, PlainMAE
from benchmarks.baselines.mixedae import PlainMixedAE
from benchmarks.baselines.resnet import BasicBlock, Bottleneck, PlainResNet
from benchmarks.baselines.simmim import PlainSimMIM, pixel_head
from benchmarks.baselines.vit import PlainBeit, PlainViT
from fastmim.layers.drop_path import DropPath
from fastmim.models.encoder import Encoder

_HEADS = ("encoder.head.", "encoder.fc.", "encoder.fc_norm.")  # classification heads, idle in pre-training


def baseline_of(method: Any) -> nn.Module:
    """The plain PyTorch module of a method, with a copy of its weights; `module(images, noise=None)` gives the loss.

    `noise` [B, cells] decides the mask as in MAE: the cells of lowest noise stay. A `fastmim.ops.Masks` is asked for
    by `noise=masks.ids_restore.float()`.

    Raises:
        ValueError: a method or an encoder that has no plain twin here.
    """
    if method.name not in _BUILDERS:
        raise ValueError(f"method {method.name!r} has no plain baseline; there are: {', '.join(sorted(_BUILDERS))}")
    plain = _BUILDERS[method.name](method).to(next(method.parameters()).dtype)
    weights = {key: value for key, value in method.state_dict().items() if not key.startswith(_HEADS)}
    plain.load_state_dict(weights, strict=True)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(method.get_parameter(name).requires_grad)
    device = next(method.parameters()).device
    plain = plain.to(device).train(method.training)
    # The strongest form of masked dense convolutions is channels-last; the other twins are as their authors run them.
    return plain.to(memory_format=torch.channels_last) if method.name in ("spark", "fcmae") else plain  # type: ignore[call-overload]


def plain_encoder(encoder: Encoder) -> nn.Module:
    """The plain twin of an encoder, without weights."""
    family = type(encoder).__name__
    if family not in _ENCODERS:
        raise ValueError(f"{family} has no plain baseline; there are: {', '.join(_ENCODERS)}")
    if any(isinstance(module, DropPath) for module in encoder.modules()):
        raise ValueError("the plain baselines have no drop path; build the encoder with drop_path_rate=0")
    return _ENCODERS[family](encoder)


def _vit_options(encoder: Any) -> dict[str, Any]:
    block = encoder.blocks[0]
    return {
        "img_size": encoder.img_size,
        "patch_size": encoder.patch_size,
        "in_chans": encoder.in_chans,
        "dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "heads": block.attn.num_heads,
        "hidden": block.mlp.fc1.out_features,
        "positions": encoder.pos_embed is not None,
        "final_norm": isinstance(encoder.norm, nn.LayerNorm),
    }


def _plain_vit(encoder: Any) -> PlainViT:
    if encoder.num_prefix_tokens != 1 or encoder.cls_token is None or encoder.no_embed_class:
        raise ValueError(f"{encoder.name}: the plain ViT has one cls token with a position, no registers")
    block = encoder.blocks[0]
    return PlainViT(
        **_vit_options(encoder),
        qkv_bias=block.attn.qkv.bias is not None,
        layer_scale=hasattr(block.ls1, "gamma"),
    )


def _plain_beit(encoder: Any) -> PlainBeit:
    block = encoder.blocks[0]
    return PlainBeit(
        **_vit_options(encoder),
        qkv_bias=block.attn.q_bias is not None,
        layer_scale=block.gamma_1 is not None,
        bias_in_blocks=block.attn.relative_position_bias_table is not None,
        shared_bias=encoder.rel_pos_bias is not None,
    )


def _plain_resnet(encoder: Any) -> PlainResNet:
    stages = [encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4]
    block = Bottleneck if hasattr(encoder.layer1[0], "conv3") else BasicBlock
    return PlainResNet(block, [len(stage) for stage in stages], encoder.in_chans)


def _plain_convnext(encoder: Any) -> PlainConvNeXt:
    block = encoder.stages[0].blocks[0]
    if block.mlp.fc1.weight.dim() == 4:
        raise ValueError(f"{encoder.name}: the plain ConvNeXt stores linear weights; choose tiny or larger")
    depths = [len(stage.blocks) for stage in encoder.stages]
    dims = [stage.blocks[0].conv_dw.out_channels for stage in encoder.stages]
    return PlainConvNeXt(
        depths, dims, encoder.in_chans, grn=hasattr(block.mlp.grn, "weight"), layer_scale=block.gamma is not None
    )


def _mae_decoder(method: Any) -> Decoder:
    ours = method.decoder
    return Decoder(
        method.encoder.embed_dim,
        method.num_patches,
        ours.decoder_pred.out_features,
        ours.decoder_embed.out_features,
        len(ours.decoder_blocks),
        ours.decoder_blocks[0].attn.num_heads,
    )


def _plain_mae(method: Any) -> PlainMAE:
    if method.cfg.decoder != "full":
        raise ValueError(f"the plain MAE has the paper's decoder only, not {method.cfg.decoder!r}")
    encoder = plain_encoder(method.encoder)
    assert isinstance(encoder, PlainViT)
    return PlainMAE(encoder, _mae_decoder(method), method.patch_size, method.num_keep, method.cfg.norm_pix_loss)


def _plain_mixedae(method: Any) -> PlainMixedAE:
    cfg = method.cfg
    if cfg.mixing != "compose" or cfg.attention != "topk" or method.num_patches % cfg.group_size:
        raise ValueError("the plain MixedAE composes images whose patches divide among them, with top-k attention")
    encoder = plain_encoder(method.encoder)
    assert isinstance(encoder, PlainViT)
    return PlainMixedAE(
        encoder,
        _mae_decoder(method),
        method.patch_size,
        cfg.group_size,
        kept=round(method.topk_ratio * method.num_patches),
        homo_layers=method.homo_layers,
        segments=method.segment_embed is not None,
        projector=isinstance(method.projector, nn.Sequential),
        contrast=(cfg.contrastive_weight, cfg.temperature),
        norm_pix=cfg.norm_pix_loss,
    )


def _token_options(method: Any) -> dict[str, Any]:
    layer, is_map = method.cfg.mask_layer, method.encoder.insertion(method.cfg.mask_layer).layout == "map"
    return {
        "at": (3 if is_map else 0) if layer is None else layer,
        "grid": method.grid,
        "token_grid": method.token_grid,
        "keep": method.num_keep,
        "head": pixel_head(method.encoder.num_features, method.encoder.stride, method.encoder.in_chans),
        "channels": method.mask_token.token.shape[0],
    }


def _plain_simmim(method: Any) -> PlainSimMIM:
    return PlainSimMIM(plain_encoder(method.encoder), **_token_options(method))


def _plain_a2mim(method: Any) -> PlainA2MIM:
    if method.cfg.detach or method.cfg.tiles:
        raise ValueError("the plain A²MIM has no `detach`, which no recipe uses, and no `tiles`, an extension of ours")
    return PlainA2MIM(
        plain_encoder(method.encoder),
        **_token_options(method),
        gated=method.mask_token.gate is not None,
        pixel_loss={"l1": l1, "focal_l1": focal_l1}[method.loss],
        freq=method.cfg.freq,
    )


def _plain_fcmae(method: Any) -> fcmae.PlainFCMAE:
    if method.cfg.grn_stats != "image":
        raise ValueError("the plain FCMAE has response norms per image only")
    ours = method.decoder
    decoder = fcmae.Decoder(
        method.encoder.num_features, ours.pred.out_channels, ours.proj.out_channels, len(ours.blocks)
    )
    return fcmae.PlainFCMAE(
        plain_encoder(method.encoder), decoder, method.grid, method.cell, method.num_keep, method.cfg.norm_pix_loss
    )


def _plain_spark(method: Any) -> spark.PlainSparK:
    encoder, ours = plain_encoder(method.encoder), method.decoder
    batch = isinstance(encoder, PlainResNet)
    decoder: spark.UNet | spark.Light
    if method.cfg.decoder == "full":
        channels = [part.mask_embedding.shape[0] for part in reversed(ours.densify)]
        width = ours.blocks[0].up.in_channels
        decoder = spark.UNet(channels, width, len(ours.blocks), method.encoder.in_chans, batch)
    else:
        inner = ours.decoder
        decoder = spark.Light(method.encoder.num_features, inner.pred.out_channels, inner.proj.out_channels, batch)
    return spark.PlainSparK(encoder, decoder, method.grid, method.cell, method.num_keep)


_ENCODERS = {
    "VisionTransformer": _plain_vit,
    "Beit": _plain_beit,
    "ResNet": _plain_resnet,
    "ConvNeXt": _plain_convnext,
}
_BUILDERS = {
    "mae": _plain_mae,
    "simmim": _plain_simmim,
    "a2mim": _plain_a2mim,
    "spark": _plain_spark,
    "fcmae": _plain_fcmae,
    "mixedae": _plain_mixedae,
}
