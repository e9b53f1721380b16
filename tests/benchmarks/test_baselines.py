"""The plain way computes what our methods compute: same weights, same mask, same loss and gradients."""

import dataclasses

import pytest
import torch

from benchmarks.baselines import baseline_of
from fastmim.methods import create_method, method_config
from fastmim.models import create_encoder
from fastmim.ops import Masks, mixing_map

SMALL_VIT = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}
SMALL_BEIT = SMALL_VIT | {"init_values": 0.1}
SMALL_CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)}
SMALL_RESNET = {"layers": (1, 1, 1, 1)}
SIZE = (64, 96)

CASES = [
    ("mae", "vit_tiny_patch16_224", SMALL_VIT, {}),
    ("mae", "vit_tiny_patch16_224", SMALL_VIT, {"norm_pix_loss": False, "mask_ratio": 0.5}),
    ("simmim", "vit_tiny_patch16_224", SMALL_VIT | {"init_values": 0.1}, {}),
    ("simmim", "beit_base_patch16_224", SMALL_BEIT, {"mask_layer": 1}),
    ("simmim", "resnet18", SMALL_RESNET, {}),
    ("a2mim", "vit_tiny_patch16_224", SMALL_VIT, {}),
    ("a2mim", "beit_base_patch16_224", SMALL_BEIT | {"use_abs_pos_emb": True}, {"freq.form": "code"}),
    ("a2mim", "resnet18", SMALL_RESNET, {"freq.form": "code", "freq.visible_weight": 1e-3}),
    ("a2mim", "resnet50", SMALL_RESNET, {"freq.form": "code", "freq.focal": False}),
    ("a2mim", "convnext_tiny", SMALL_CONVNEXT, {"freq.replacement": "mean"}),
    ("a2mim", "convnextv2_tiny", SMALL_CONVNEXT, {"freq.weight": 0.0}),
    ("spark", "resnet18", SMALL_RESNET, {"decoder_width": 64}),
    ("spark", "resnet50", SMALL_RESNET, {"decoder": "light", "decoder_width": 32}),
    ("spark", "convnext_tiny", SMALL_CONVNEXT, {"decoder_width": 32}),
    ("spark", "convnext_tiny", SMALL_CONVNEXT, {"decoder": "light", "decoder_width": 32}),
    ("fcmae", "convnextv2_tiny", SMALL_CONVNEXT, {"decoder_dim": 40}),
    ("fcmae", "convnext_tiny", SMALL_CONVNEXT, {"decoder_dim": 40, "decoder_depth": 2, "norm_pix_loss": False}),
    ("fcmae", "resnet18", SMALL_RESNET, {"decoder_dim": 40}),
]


def build(method: str, encoder: str, options: dict, settings: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    config = method_config(method)()
    for key, value in settings.items():
        if key.startswith("freq."):
            config.freq = dataclasses.replace(config.freq, **{key.removeprefix("freq."): value})
        else:
            config = dataclasses.replace(config, **{key: value})
    model = create_method(method, create_encoder(encoder, img_size=SIZE, **options), config, SIZE)
    with torch.no_grad():  # initial zeros (bias tables, tokens, gates) would hide mistakes
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def masks_for(model: torch.nn.Module, batch: int) -> Masks:
    cells = model.grid[0] * model.grid[1]
    ids_shuffle = torch.rand(batch, cells).argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    return Masks(ids_shuffle[:, : model.num_keep], ids_restore, ids_restore >= model.num_keep)


MIXED = [
    {},
    {"group_size": 2, "projector": "mlp", "homo_layers": (0,), "topk_ratio": 0.3},
    {"group_size": 3, "segment_embedding": "none", "norm_pix_loss": False, "exact_pruning": False},
    {"contrastive_weight": 0.0},
]


@pytest.mark.parametrize("settings", MIXED)
def test_mixedae_has_the_same_loss_and_gradients(settings):
    model = build("mixedae", "vit_tiny_patch16_224", SMALL_VIT, settings)
    plain, size = baseline_of(model), model.cfg.group_size
    images = torch.randn(2 * size, 3, *SIZE)
    mixing = mixing_map(2, size, model.num_patches, torch.tensor([1, 2, 0]))
    compare(model, plain, model.reconstruct(images, mixing).loss, plain(images, noise=mixing.segments.float()))


def test_a_mixedae_that_the_plain_way_does_not_know_is_refused():
    model = build("mixedae", "vit_tiny_patch16_224", SMALL_VIT, {"mixing": "full"})
    with pytest.raises(ValueError, match="the plain MixedAE composes images"):
        baseline_of(model)


@pytest.mark.parametrize("method, encoder, options, settings", CASES)
def test_same_loss_and_gradients(method, encoder, options, settings):
    model = build(method, encoder, options, settings)
    plain = baseline_of(model)
    images, masks = torch.randn(3, 3, *SIZE), masks_for(model, 3)
    ours = model.predict_removed(images, masks).loss
    compare(model, plain, ours, plain(images, noise=masks.ids_restore.float()))


def compare(model: torch.nn.Module, plain: torch.nn.Module, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Losses and the gradients of all parameters."""
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    ours.backward()
    theirs.backward()
    plain_gradients = {name: p.grad for name, p in plain.named_parameters()}
    largest = max(float(g.norm()) for g in plain_gradients.values() if g is not None)
    compared = 0
    for name, parameter in model.named_parameters():
        if name in plain_gradients and plain_gradients[name] is not None:
            difference = float((parameter.grad - plain_gradients[name]).norm())
            assert difference <= 1e-3 * float(plain_gradients[name].norm()) + 1e-5 * largest, name
            compared += 1
    assert compared > 10


def test_noise_decides_the_mask_and_none_draws_a_new_one():
    model = build("mae", "vit_tiny_patch16_224", SMALL_VIT, {})
    plain, images = baseline_of(model), torch.randn(2, 3, *SIZE)
    noise = torch.rand(2, model.num_patches)
    assert torch.equal(plain(images, noise), plain(images, noise))
    assert not torch.equal(plain(images), plain(images))


def test_weights_are_copies():
    model = build("simmim", "vit_tiny_patch16_224", SMALL_VIT, {})
    plain = baseline_of(model)
    with torch.no_grad():
        model.encoder.cls_token.zero_()
    assert plain.encoder.cls_token.abs().sum() > 0


def test_drop_path_is_refused_with_a_sentence():
    encoder = create_encoder("vit_tiny_patch16_224", img_size=SIZE, drop_path_rate=0.1, **SMALL_VIT)
    with pytest.raises(ValueError, match="drop_path_rate=0"):
        baseline_of(create_method("simmim", encoder, None, SIZE))
