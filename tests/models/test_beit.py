"""Beit: timm's keys and features with every kind of position; encoding of visible patches; insertion."""

import pytest
import torch

from fastmim.models import Insertion, create_encoder, list_encoders

SMALL = {"img_size": (32, 48), "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 4}
PER_BLOCK = {"use_abs_pos_emb": False, "use_rel_pos_bias": True}
SHARED = {"use_abs_pos_emb": False, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}  # SimMIM
ABSOLUTE_AND_PER_BLOCK = {"use_abs_pos_emb": True, "use_rel_pos_bias": True, "init_values": 0.1}  # A²MIM
ABSOLUTE = {"use_abs_pos_emb": True, "use_rel_pos_bias": False, "init_values": 0.0}
ALL = {"use_abs_pos_emb": True, "use_rel_pos_bias": True, "use_shared_rel_pos_bias": True, "qkv_bias": False}
POSITIONS = [PER_BLOCK, SHARED, ABSOLUTE_AND_PER_BLOCK, ABSOLUTE, ALL]


def build(options=None):
    """A small encoder in which every parameter matters: biases and tables start at zero otherwise."""
    encoder = create_encoder("beit_base_patch16_224", **{**SMALL, **(options or {})}).eval()
    generator = torch.Generator().manual_seed(1)
    for key, value in encoder.state_dict().items():
        if value.ndim == 1 or "table" in key:
            value.normal_(0.5, 0.5, generator=generator)
    return encoder


def images_for(encoder, batch=2, dtype=torch.float32):
    shape = (batch, encoder.in_chans, *encoder.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def some_ids(batch, keep):
    return torch.rand(batch, 24, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :keep]


def shapes(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


@pytest.mark.timm
@pytest.mark.parametrize("name", list_encoders("beit*"))
def test_keys_and_shapes_are_timms(timm, name):
    with torch.device("meta"):
        ours = create_encoder(name, num_classes=3)
        theirs = timm.create_model(name, **ours.timm_kwargs)
    assert shapes(ours) == shapes(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.global_pool == theirs.global_pool
    assert [block.attn.num_heads for block in ours.blocks] == [block.attn.num_heads for block in theirs.blocks]


@pytest.mark.timm
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"in_chans": 13, "num_classes": 5},
        {"in_chans": 1, "use_fc_norm": False, "drop_path_rate": 0.2},
        {"global_pool": "token", "patch_size": (16, 8)},
    ],
    ids=str,
)
def test_features_agree_with_timm_and_states_load_both_ways(timm, positions, options):
    ours = build({**positions, **options})
    theirs = timm.create_model(ours.name, **ours.timm_kwargs).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    images = images_for(ours)
    features, expected = ours.forward_features(images), theirs.forward_features(images)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)
    assert ours.no_weight_decay() == theirs.no_weight_decay() & dict(theirs.named_parameters()).keys()


@pytest.mark.timm
def test_gradients_agree_with_timm(timm):
    ours = build({**ALL, "qkv_bias": True, "init_values": 0.1, "num_classes": 5})
    theirs = timm.create_model(ours.name, **ours.timm_kwargs).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for model in (ours, theirs):
        model.double()(images_for(ours, dtype=torch.float64)).square().sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=lambda text, name=name: f"{name}: {text}")


def test_starts_like_beit():
    torch.manual_seed(0)
    encoder = create_encoder("beit_base_patch16_224", **{**SMALL, "embed_dim": 256}, num_classes=64)
    state = encoder.state_dict()
    for name, std in [
        ("blocks.1.attn.qkv.weight", 0.02),
        ("blocks.0.attn.proj.weight", 0.02 / 2**0.5),
        ("blocks.1.mlp.fc2.weight", 0.02 / 2),
        ("head.weight", 0.02e-3),
        ("cls_token", 0.02),
    ]:
        assert state[name].std().item() == pytest.approx(std, rel=0.15), name
    assert not state["blocks.0.attn.relative_position_bias_table"].any()
    assert (state["blocks.1.gamma_2"] == 0.1).all()


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_all_patches_visible_is_the_full_encoding(positions):
    encoder = build({**positions, "use_fc_norm": False})
    images = images_for(encoder)
    full = encoder.forward_features(images)
    in_order = torch.arange(24).expand(2, -1)
    torch.testing.assert_close(encoder.forward_visible(images, in_order), full, rtol=1e-5, atol=1e-5)
    shuffled = some_ids(2, 24)
    expected = torch.cat((full[:, :1], full[:, 1:][torch.arange(2)[:, None], shuffled]), dim=1)
    torch.testing.assert_close(encoder.forward_visible(images, shuffled), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", [PER_BLOCK, ABSOLUTE_AND_PER_BLOCK], ids=str)
def test_visible_encoding_is_the_full_one_with_masked_keys_shut_out(positions):
    encoder = build(positions).double()
    images, ids_keep = images_for(encoder, 3, torch.float64), some_ids(3, 7)
    shut_out = torch.full((3, 25), -torch.inf, dtype=torch.float64)
    shut_out[:, 0] = 0.0
    shut_out.scatter_(1, 1 + ids_keep, 0.0)
    x = torch.cat((encoder.cls_token.expand(3, -1, -1), encoder.patch_embed(images)), dim=1)
    if encoder.pos_embed is not None:
        x = x + encoder.pos_embed
    for block in encoder.blocks:
        x = block(x, shut_out[:, None, None, :], encoder.relative_position_index)
    kept = torch.cat((ids_keep.new_zeros(3, 1), 1 + ids_keep), dim=1)
    torch.testing.assert_close(encoder.forward_visible(images, ids_keep), x[torch.arange(3)[:, None], kept])


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_masked_pixels_are_not_read(positions):
    encoder = build(positions)
    images, ids_keep = images_for(encoder), some_ids(2, 6)
    hidden = torch.ones(2, 24).scatter(1, ids_keep, 0.0).view(2, 1, 4, 6)
    hidden = hidden.repeat_interleave(8, 2).repeat_interleave(8, 3).bool()
    poisoned = images.masked_fill(hidden, float("nan"))
    assert torch.equal(encoder.forward_visible(images, ids_keep), encoder.forward_visible(poisoned, ids_keep))


def test_insertion_is_before_cls_and_positions():
    encoder, received, entered = build(ABSOLUTE_AND_PER_BLOCK), [], []
    encoder.blocks[0].register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
    images = images_for(encoder)
    assert encoder.insertion() == Insertion(channels=64, stride=8, layout="tokens")

    def insert(patches):
        received.append(patches)
        return torch.zeros_like(patches)

    assert encoder.forward_map(images, insert).shape == (2, 64, 4, 6)
    assert torch.equal(received[0], encoder.patch_embed(images))
    expected = torch.cat((encoder.cls_token, torch.zeros(1, 24, 64)), dim=1) + encoder.pos_embed
    torch.testing.assert_close(entered[0], expected.expand(2, -1, -1))


@pytest.mark.parametrize("positions", [SHARED, ABSOLUTE_AND_PER_BLOCK], ids=str)
def test_runs_under_bf16_autocast(positions):
    encoder = build({**positions, "use_fc_norm": False})
    images, ids_keep = images_for(encoder), some_ids(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder.forward_visible(images, ids_keep)
        found.float().square().mean().backward()
    torch.testing.assert_close(found.float(), encoder.forward_visible(images, ids_keep), rtol=0.1, atol=0.1)
    assert all(p.grad is not None for name, p in encoder.named_parameters() if not name.startswith("head"))


def test_visible_encoding_is_one_graph():
    encoder = build(ALL)
    images, ids_keep = images_for(encoder), some_ids(2, 6)
    compiled = torch.compile(encoder.forward_visible, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images, ids_keep), encoder.forward_visible(images, ids_keep))
