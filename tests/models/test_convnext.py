"""ConvNeXt V1 and V2: timm's keys and features, insertion in every stage, messages."""

import pytest
import torch

from fastmim.layers.drop_path import DropPath
from fastmim.models import create_encoder, list_encoders
from fastmim.models.encoder import Insertion
from fastmim.models.norms import GlobalResponseNorm, LayerNorm2d

SMALL = ["atto", "femto", "pico", "nano"]
V1 = [f"convnext_{size}" for size in [*SMALL, "tiny", "small", "base", "large", "xlarge"]]
V2 = [f"convnextv2_{size}" for size in [*SMALL, "tiny", "small", "base", "large", "huge"]]

SHALLOW = {"depths": (1, 1, 2, 1), "dims": (48, 96, 192, 384)}  # the larger sizes differ from the smaller by their MLP


def trained_looking(model):
    """The same model with weights that let every layer matter: LayerScale starts near, GRN at zero."""
    generator = torch.Generator().manual_seed(1)
    for value in model.state_dict().values():
        if value.ndim == 1:
            value.normal_(0.3, 0.2, generator=generator)
    return model


def test_every_size_is_registered():
    assert {*V1, *V2} <= set(list_encoders("convnext*"))


@pytest.mark.timm
@pytest.mark.parametrize("name", [*V1, *V2])
def test_keys_and_shapes_are_timms(timm, name):
    for options in ({}, {"num_classes": 7, "in_chans": 13, "drop_path_rate": 0.2, "img_size": (96, 64)}):
        with torch.device("meta"):
            ours = create_encoder(name, **options)
            theirs = timm.create_model(name, **ours.timm_kwargs)
        shapes = [[(key, tuple(value.shape)) for key, value in m.state_dict().items()] for m in (ours, theirs)]
        assert shapes[0] == shapes[1]
        assert ours.num_features == theirs.num_features
        assert ours.name == name


@pytest.mark.timm
@pytest.mark.parametrize(
    "name, options, in_chans, size",
    [
        ("convnext_atto", {}, 3, (64, 96)),
        ("convnext_atto", {}, 13, (47, 70)),
        ("convnextv2_atto", {}, 1, (32, 32)),
        ("convnextv2_tiny", SHALLOW, 3, (64, 96)),
        ("convnext_tiny", {**SHALLOW, "ls_init_value": 0.1}, 1, (32, 64)),
    ],
)
def test_features_agree_with_timm_and_states_load_both_ways(timm, name, options, in_chans, size):
    ours = create_encoder(name, in_chans=in_chans, num_classes=5, **options)
    theirs = timm.create_model(name, **ours.timm_kwargs)
    for (key, mine), timms in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if mine.ndim == 1:  # biases, norms, LayerScale, GRN start alike
            torch.testing.assert_close(mine, timms, msg=key)
    ours.load_state_dict(trained_looking(theirs).state_dict(), strict=True)
    images = torch.randn(2, in_chans, *size, generator=torch.Generator().manual_seed(0))
    features, expected = ours.forward_features(images), theirs.forward_features(images)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.forward_head(features), theirs.forward_head(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.forward_head(features, pre_logits=True), theirs.forward_head(expected, True))
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.timm
def test_drop_path_rates_are_timms(timm):
    ours = create_encoder("convnext_tiny", drop_path_rate=0.4)
    theirs = timm.create_model("convnext_tiny", **ours.timm_kwargs)
    for mine, timms in zip(ours.stages, theirs.stages, strict=True):
        for a, b in zip(mine.blocks, timms.blocks, strict=True):
            assert getattr(a.drop_path, "drop_prob", 0) == pytest.approx(getattr(b.drop_path, "drop_prob", 0))


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
@pytest.mark.parametrize("at", [0, 1, 2, 3, None])
def test_inserts_between_downsampling_and_blocks(name, at):
    encoder = trained_looking(create_encoder(name))
    images = torch.randn(1, 3, 64, 96)
    seen = []

    def double(x):
        seen.append(x)
        return 2 * x

    index = 3 if at is None else at
    place = encoder.insertion(at)
    assert place == Insertion(40 * 2**index, 4 * 2**index, "map")
    plain, changed = encoder.forward_map(images), encoder.forward_map(images, double, at)
    assert [tuple(x.shape) for x in seen] == [(1, place.channels, 64 // place.stride, 96 // place.stride)]
    assert changed.shape == plain.shape == (1, 320, 2, 3)
    assert not torch.allclose(plain, changed)
    torch.testing.assert_close(encoder.forward_map(images, lambda x: x, at), plain)
    before = encoder.stem(images)
    for stage in encoder.stages[:index]:
        before = stage(before)
    torch.testing.assert_close(seen[0], encoder.stages[index].downsample(before))


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
def test_gradients_reach_every_parameter_through_an_insertion(name):
    encoder = trained_looking(create_encoder(name))
    gate = torch.full((320, 1, 1), 0.5, requires_grad=True)
    features = encoder.forward_map(torch.randn(2, 3, 64, 64), lambda x: x * gate)
    encoder.forward_head(features)[:, 0].square().mean().backward()
    for key, parameter in [*encoder.named_parameters(), ("gate", gate)]:
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


def test_forward_without_classifier_gives_pooled_normalised_features():
    encoder = create_encoder("convnext_atto")
    features = encoder(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, 320)
    torch.testing.assert_close(features.mean(dim=1), torch.zeros(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("at", [-1, 4])
def test_names_the_insertion_points_that_exist(at):
    encoder = create_encoder("convnext_atto")
    with pytest.raises(ValueError, match=f"at={at} does not exist.*0 to 3"):
        encoder.insertion(at)
    with pytest.raises(ValueError, match=f"at={at} does not exist"):
        encoder.forward_map(torch.zeros(1, 3, 64, 64), lambda x: x, at)


def test_says_how_large_an_image_must_be():
    with pytest.raises(ValueError, match="convnext_atto: images are at least 32 x 32 pixels, but was given 64 x 28"):
        create_encoder("convnext_atto")(torch.zeros(1, 3, 64, 28))


def test_names_both_channel_counts():
    with pytest.raises(ValueError, match=r"convnext_atto: expects images \[B, 1, H, W\].*\[1, 3, 64, 64\]"):
        create_encoder("convnext_atto", in_chans=1)(torch.zeros(1, 3, 64, 64))


def test_layer_norm_2d_normalises_the_channels_of_each_pixel():
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(LayerNorm2d(6).double()(x), expected)


def test_global_response_norm_follows_its_formula_and_starts_as_the_identity():
    norm = GlobalResponseNorm(6).double()
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(norm(x), x)
    trained_looking(norm)
    response = x.square().sum(dim=(1, 2)).sqrt()[:, None, None]
    relative = response / (response.mean(dim=-1, keepdim=True) + norm.eps)
    torch.testing.assert_close(norm(x), x + norm.weight * x * relative + norm.bias)


def test_drop_path_keeps_the_mean_and_drops_whole_images():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    dropped = DropPath(0.25)(x)
    assert set(dropped.flatten().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (dropped.flatten(1).var(dim=1) == 0).all()
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert DropPath(0.25).eval()(x) is x


def test_drop_path_of_one_is_refused():
    with pytest.raises(ValueError, match=r"drop_path_rate is in \[0, 1\), but was given 1"):
        create_encoder("convnext_atto", drop_path_rate=1.0)
