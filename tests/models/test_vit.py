"""VisionTransformer: timm's keys and features; encoding of visible patches; insertion; messages."""

import pytest
import torch

from fastmim.layers.drop_path import DropPath
from fastmim.layers.sincos_positions import sincos_positions
from fastmim.models import Insertion, create_encoder, list_encoders

SMALL = {"img_size": (32, 48), "patch_size": 8, "depth": 2, "embed_dim": 48}
REGISTERS = {"reg_tokens": 4, "no_embed_class": True}
NO_CLS = {"class_token": False, "global_pool": "avg"}
OPTIONS = [
    {},
    {"in_chans": 1, "num_classes": 7},
    {"in_chans": 13},
    {"patch_size": (8, 16)},
    {"reg_tokens": 4},
    REGISTERS,
    {"init_values": 0.5, "qkv_bias": False},
    NO_CLS,
    {**NO_CLS, **REGISTERS, "fc_norm": False, "num_classes": 5},
    {"global_pool": "avg", "num_classes": 5},
    {"global_pool": ""},
    {"pos_embed": "none"},
    {"drop_path_rate": 0.3, "mlp_ratio": 2.5},
]


def shapes(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def build(options=None, name="vit_tiny_patch16_224"):
    """A small encoder in which every parameter matters."""
    encoder = create_encoder(name, **{**SMALL, **(options or {})}).eval()
    generator = torch.Generator().manual_seed(1)
    for key, value in encoder.state_dict().items():
        if value.ndim == 1 or "token" in key:
            value.normal_(0.5, 0.2, generator=generator)
    return encoder


def images_for(encoder, batch=2, dtype=torch.float32):
    shape = (batch, encoder.in_chans, *encoder.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def some_ids(encoder, batch, keep):
    count = encoder.grid_size[0] * encoder.grid_size[1]
    return torch.rand(batch, count, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :keep]


@pytest.mark.timm
@pytest.mark.parametrize("name", list_encoders("vit_*"))
def test_keys_and_shapes_are_timms(timm, name):
    with torch.device("meta"):
        ours = create_encoder(name, num_classes=3)
        theirs = timm.create_model(name, **ours.timm_kwargs)
    assert shapes(ours) == shapes(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.img_size == theirs.patch_embed.img_size
    assert (ours.global_pool, ours.num_prefix_tokens) == (theirs.global_pool, theirs.num_prefix_tokens)
    assert [block.attn.num_heads for block in ours.blocks] == [block.attn.num_heads for block in theirs.blocks]


@pytest.mark.timm
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_features_agree_with_timm_and_states_load_both_ways(timm, options):
    ours = build(options)
    theirs = timm.create_model(ours.name, **ours.timm_kwargs).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = images_for(ours)
    features, expected = ours.forward_features(images), theirs.forward_features(images)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.forward_head(features, True), theirs.forward_head(features, True))
    assert ours.no_weight_decay() == theirs.no_weight_decay() & dict(theirs.named_parameters()).keys()
    rates = [[module.drop_prob for module in m.modules() if hasattr(module, "drop_prob")] for m in (ours, theirs)]
    assert rates[0] == rates[1]


@pytest.mark.timm
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_wee_patch16_reg1_gap_256"])
def test_whole_models_agree_with_timm(timm, name):
    ours = create_encoder(name).eval()
    with torch.device("meta"):
        theirs = timm.create_model(name, **ours.timm_kwargs).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)
    images = images_for(ours, batch=1)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.timm
def test_gradients_agree_with_timm(timm):
    ours = build({**REGISTERS, "init_values": 0.5, "num_classes": 5})
    theirs = timm.create_model(ours.name, **ours.timm_kwargs).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for model in (ours, theirs):
        model.double()(images_for(ours, dtype=torch.float64)).square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.timm
def test_sincos_positions_reach_timm_in_the_state(timm):
    ours = build({"pos_embed": "sincos"})
    assert torch.equal(ours.pos_embed, sincos_positions(48, (4, 6), 1))
    assert not ours.pos_embed.requires_grad
    theirs = timm.create_model(ours.name, **ours.timm_kwargs).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = images_for(ours)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_starts_like_timm():
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", depth=2, reg_tokens=2)
    for name in ("blocks.1.attn.qkv.weight", "blocks.0.mlp.fc2.weight", "pos_embed"):
        assert encoder.state_dict()[name].std().item() == pytest.approx(0.02, rel=0.05), name
    assert encoder.cls_token.abs().max() < 1e-5
    assert encoder.reg_token.abs().max() < 1e-5
    assert not encoder.blocks[0].attn.qkv.bias.any()


@pytest.mark.parametrize("options", [{}, REGISTERS, NO_CLS, {"pos_embed": "none"}, {"patch_size": (16, 8)}], ids=str)
def test_all_patches_visible_is_the_full_encoding(options):
    encoder = build(options)
    images, prefix = images_for(encoder), encoder.num_prefix_tokens
    full = encoder.forward_features(images)
    in_order = torch.arange(full.shape[1] - prefix).expand(2, -1)
    torch.testing.assert_close(encoder.forward_visible(images, in_order), full, rtol=1e-5, atol=1e-5)
    shuffled = some_ids(encoder, 2, in_order.shape[1])
    expected = torch.cat((full[:, :prefix], full[:, prefix:][torch.arange(2)[:, None], shuffled]), dim=1)
    torch.testing.assert_close(encoder.forward_visible(images, shuffled), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, REGISTERS, NO_CLS], ids=str)
def test_visible_tokens_see_only_each_other(options):
    encoder = build(options).double()
    images, ids_keep = images_for(encoder, 3, torch.float64), some_ids(encoder, 3, 7)
    latent = encoder.forward_visible(images, ids_keep)
    for image, ids, found in zip(images, ids_keep, latent, strict=True):
        positions = encoder.pos_embed
        with_prefix = positions.shape[1] - encoder.patch_embed.num_patches
        patches = encoder.patch_embed(image[None])[:, ids] + positions[:, with_prefix:][:, ids]
        prefix = [token for token in (encoder.cls_token, encoder.reg_token) if token is not None]
        if with_prefix:
            prefix = [torch.cat(prefix, 1) + positions[:, :with_prefix]]
        x = torch.cat([*prefix, patches], dim=1)
        for block in encoder.blocks:
            x = block(x)
        torch.testing.assert_close(found, encoder.norm(x)[0])


def test_masked_pixels_are_not_read():
    encoder = build()
    images, ids_keep = images_for(encoder), some_ids(encoder, 2, 6)
    hidden = torch.ones(2, 24).scatter(1, ids_keep, 0.0).view(2, 1, 4, 6)
    hidden = hidden.repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(images).bool()
    poisoned = images.masked_fill(hidden, float("nan"))
    assert torch.equal(encoder.forward_visible(images, ids_keep), encoder.forward_visible(poisoned, ids_keep))
    images.requires_grad_()
    encoder.forward_visible(images, ids_keep).square().sum().backward()
    assert not images.grad[hidden].any()
    assert images.grad[~hidden].all()


def test_image_strides_do_not_matter():
    encoder = build()
    images, ids_keep = images_for(encoder), some_ids(encoder, 2, 6)
    expected, expected_full = encoder.forward_visible(images, ids_keep), encoder(images)
    cut = torch.zeros(2, 4, 40, 50)[:, 1:, 3:35, 1:49].copy_(images)
    for view in (images.to(memory_format=torch.channels_last), cut):
        torch.testing.assert_close(encoder.forward_visible(view, ids_keep), expected)
        torch.testing.assert_close(encoder(view), expected_full)


def test_map_is_the_patch_tokens_row_by_row():
    encoder = build(REGISTERS)
    images = images_for(encoder)
    tokens = encoder.forward_features(images)[:, 5:]
    assert torch.equal(encoder.forward_map(images), tokens.reshape(2, 4, 6, 48).permute(0, 3, 1, 2))
    assert torch.equal(encoder.forward_map(images, insert=lambda x: x, at=1), encoder.forward_map(images))


@pytest.mark.parametrize("at", [None, 0])
def test_default_insertion_is_before_cls_and_positions(at):
    encoder, received, entered = build({"reg_tokens": 2}), [], []
    encoder.blocks[0].register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
    images = images_for(encoder)

    def insert(patches):
        received.append(patches)
        return torch.zeros_like(patches)

    encoder.forward_map(images, insert, at)
    assert torch.equal(received[0], encoder.patch_embed(images))
    prefix = torch.cat((encoder.cls_token, encoder.reg_token), dim=1)
    expected = torch.cat((prefix, torch.zeros(1, 24, 48)), dim=1) + encoder.pos_embed
    torch.testing.assert_close(entered[0], expected.expand(2, -1, -1))


def test_later_insertion_leaves_prefix_tokens_alone():
    encoder, entered = build({"reg_tokens": 2, "depth": 3}), []
    encoder.blocks[2].register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
    images = images_for(encoder)
    encoder.forward_map(images)
    encoder.forward_map(images, insert=lambda patches: 2 * patches, at=2)
    plain, inserted = entered
    assert torch.equal(inserted[:, :3], plain[:, :3])
    assert torch.equal(inserted[:, 3:], 2 * plain[:, 3:])


def test_insertion_describes_what_insert_receives():
    encoder = build()
    assert encoder.insertion() == encoder.insertion(1) == Insertion(channels=48, stride=8, layout="tokens")
    for at in (2, -1):
        with pytest.raises(ValueError, match=f"at={at} does not exist; this encoder has points 0 to 1"):
            encoder.insertion(at)
        with pytest.raises(ValueError, match=f"at={at} does not exist"):
            encoder.forward_map(images_for(encoder), insert=lambda x: x, at=at)
    with pytest.raises(ValueError, match="cells of 8 x 16 pixels have no single stride"):
        build({"patch_size": (8, 16)}).insertion()


def test_drop_path_acts_in_training_only():
    encoder = build({"drop_path_rate": 0.9, "depth": 3})
    images = images_for(encoder, batch=8)
    assert torch.equal(encoder(images), encoder(images))
    torch.manual_seed(0)
    encoder.train()
    assert not torch.equal(encoder(images), encoder(images))


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    kept = DropPath(0.25).train()(torch.ones(20000, 1, 2))
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(kept[..., 0], kept[..., 1])
    assert kept.mean().item() == pytest.approx(1.0, abs=0.02)


def test_visible_encoding_is_one_graph():
    encoder = build()
    images, ids_keep = images_for(encoder), some_ids(encoder, 2, 6)
    compiled = torch.compile(encoder.forward_visible, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images, ids_keep), encoder.forward_visible(images, ids_keep))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"img_size": (30, 48)}, "img_size 30 x 48 is not divisible by patch_size 8 x 8"),
        ({"img_size": (32, 48, 3)}, r"img_size is a positive integer or \(height, width\)"),
        ({"patch_size": 0}, "patch_size is a positive integer"),
        ({"class_token": False}, 'global_pool="token" reads the cls token'),
        ({"global_pool": "max"}, "global_pool is one of '', 'token', 'avg', but was given 'max'"),
        ({"pos_embed": "mae"}, "pos_embed is one of 'learn', 'sincos', 'none', but was given 'mae'"),
        ({"num_heads": 5}, "embed_dim 48 is not divisible by num_heads 5"),
        ({"drop_path_rate": 1.5}, r"drop_path_rate is in \[0, 1\)"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(options)


def test_wrong_inputs_name_both_sizes():
    encoder = build()
    ids_keep = torch.zeros(2, 3, dtype=torch.int64)
    for forward in (encoder, encoder.forward_map, lambda images: encoder.forward_visible(images, ids_keep)):
        with pytest.raises(ValueError, match=r"vit_tiny_patch16_224: built for images of 32 x 48 .* given 48 x 32"):
            forward(torch.zeros(2, 3, 48, 32))
        with pytest.raises(ValueError, match=r"expects images \[B, 3, H, W\], but was given \[2, 1, 32, 48\]"):
            forward(torch.zeros(2, 1, 32, 48))
    with pytest.raises(ValueError, match=r"expects ids_keep \[5, K\] .* but was given \[2, 3\]"):
        encoder.forward_visible(torch.zeros(5, 3, 32, 48), ids_keep)
