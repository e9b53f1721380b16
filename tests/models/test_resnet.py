"""ResNet: timm's keys and features, insertion before every stage, messages."""

import pytest
import torch

from fastmim.models import create_encoder, list_encoders
from fastmim.models.encoder import Insertion

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200"]


def shapes(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def trained_looking(model):
    """The same model with weights that let every layer matter: last batch norms start at zero, statistics at (0, 1)."""
    generator = torch.Generator().manual_seed(1)
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point() and value.ndim == 1:
            value.normal_(0.5, 0.2, generator=generator)
    return model


def test_every_size_is_registered():
    assert set(NAMES) <= set(list_encoders("resnet*"))


@pytest.mark.timm
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"num_classes": 7, "in_chans": 13, "drop_path_rate": 0.2, "img_size": 96}])
def test_keys_and_shapes_are_timms(timm, name, options):
    with torch.device("meta"):
        ours = create_encoder(name, **options)
        theirs = timm.create_model(name, **ours.timm_kwargs)
    assert shapes(ours) == shapes(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.num_features == theirs.num_features
    assert ours.name == name


@pytest.mark.timm
@pytest.mark.parametrize(
    "name, in_chans, size, training",
    [
        ("resnet18", 3, (64, 96), True),
        ("resnet18", 1, (32, 32), False),
        ("resnet18", 13, (50, 33), True),
        ("resnet50", 3, (64, 96), True),
        ("resnet50", 3, (64, 96), False),
    ],
)
def test_features_agree_with_timm_and_states_load_both_ways(timm, name, in_chans, size, training):
    ours = create_encoder(name, in_chans=in_chans, num_classes=5)
    theirs = trained_looking(timm.create_model(name, **ours.timm_kwargs))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.train(training)
    theirs.train(training)
    images = torch.randn(2, in_chans, *size, generator=torch.Generator().manual_seed(0))
    features, expected = ours.forward_features(images), theirs.forward_features(images)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.forward_head(features), theirs.forward_head(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.forward_head(features, pre_logits=True), theirs.forward_head(expected, True))
    theirs.load_state_dict(ours.state_dict(), strict=True)  # in training, with the new running statistics
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[key], msg=key)


@pytest.mark.timm
def test_drop_path_rates_are_timms(timm):
    ours = create_encoder("resnet34", drop_path_rate=0.3)
    theirs = timm.create_model("resnet34", **ours.timm_kwargs)
    for stage in range(1, 5):
        pairs = zip(ours.get_submodule(f"layer{stage}"), theirs.get_submodule(f"layer{stage}"), strict=True)
        for mine, timms in pairs:
            assert getattr(mine.drop_path, "drop_prob", 0) == pytest.approx(getattr(timms.drop_path, "drop_prob", 0))


@pytest.mark.parametrize(
    "name, channels", [("resnet18", (64, 64, 128, 256, 512)), ("resnet50", (64, 256, 512, 1024, 2048))]
)
@pytest.mark.parametrize("at", [0, 1, 2, 3, None])
def test_inserts_before_the_chosen_stage(name, channels, at):
    encoder = create_encoder(name).eval()
    images = torch.randn(1, 3, 64, 96)
    seen = []

    def double(x):
        seen.append(x)
        return 2 * x

    index = 3 if at is None else at
    place = encoder.insertion(at)
    assert place == Insertion(channels[index], (4, 4, 8, 16)[index], "map")
    plain, changed = encoder.forward_map(images), encoder.forward_map(images, double, at)
    assert [tuple(x.shape) for x in seen] == [(1, place.channels, 64 // place.stride, 96 // place.stride)]
    assert changed.shape == plain.shape == (1, channels[4], 2, 3)
    assert not torch.allclose(plain, changed)
    torch.testing.assert_close(encoder.forward_map(images, lambda x: x, at), plain)
    rest = encoder.get_submodule(f"layer{index + 1}")(2 * seen[0])  # what follows the insertion saw the change
    for stage in range(index + 2, 5):
        rest = encoder.get_submodule(f"layer{stage}")(rest)
    torch.testing.assert_close(rest, changed)


def test_gradients_reach_every_parameter_through_an_insertion():
    encoder = create_encoder("resnet18", zero_init_last=False)
    gate = torch.full((256, 1, 1), 0.5, requires_grad=True)
    encoder.forward_map(torch.randn(2, 3, 64, 64), lambda x: x * gate).square().mean().backward()
    for name, parameter in [*encoder.named_parameters(), ("gate", gate)]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_forward_without_classifier_gives_pooled_features():
    encoder = create_encoder("resnet18").eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder(images), encoder.forward_map(images).mean(dim=(2, 3)))


@pytest.mark.parametrize("at", [-1, 4])
def test_names_the_insertion_points_that_exist(at):
    encoder = create_encoder("resnet18")
    with pytest.raises(ValueError, match=f"at={at} does not exist.*0 to 3"):
        encoder.insertion(at)
    with pytest.raises(ValueError, match=f"at={at} does not exist"):
        encoder.forward_map(torch.zeros(1, 3, 64, 64), lambda x: x, at)


def test_names_both_channel_counts():
    with pytest.raises(ValueError, match=r"resnet18: expects images \[B, 13, H, W\].*\[1, 3, 64, 64\]"):
        create_encoder("resnet18", in_chans=13)(torch.zeros(1, 3, 64, 64))


def test_suggests_the_option_that_was_meant():
    with pytest.raises(ValueError, match="drop_path_rate"):
        create_encoder("resnet18", drop_path_rat=0.1)
