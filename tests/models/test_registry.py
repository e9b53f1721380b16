"""Encoders by name: what is listed, what is recorded for timm, and what a wrong name or option is answered."""

import pytest
import torch

from fastmim.models import Encoder, VisionTransformer, create_encoder, list_encoders
from fastmim.models.registry import register_encoders


def test_names_are_sorted_and_filtered_by_pattern():
    names = list_encoders()
    assert names == sorted(names)
    assert list_encoders("vit_tiny*") == ["vit_tiny_patch16_224", "vit_tiny_patch16_384"]
    assert list_encoders("nothing*") == []


@pytest.mark.parametrize("family", ["vit_*", "beit*", "resnet*", "convnext*"])
def test_every_family_is_registered(family):
    assert list_encoders(family)


def test_records_name_and_options_for_timm():
    encoder = create_encoder("vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, in_chans=1, depth=1, fc_norm=None)
    assert encoder.name == "vit_tiny_patch16_224"
    assert encoder.timm_kwargs == {
        "num_classes": 0,
        "img_size": (32, 48),
        "patch_size": 8,
        "in_chans": 1,
        "depth": 1,
    }


def test_builds_no_classifier_unless_asked():
    images = torch.zeros(1, 3, 32, 32)
    options = {"img_size": 32, "depth": 1}
    assert create_encoder("vit_tiny_patch16_224", **options)(images).shape == (1, 192)
    assert create_encoder("vit_tiny_patch16_224", num_classes=5, **options)(images).shape == (1, 5)


@pytest.mark.parametrize(
    "name, answer",
    [
        ("vit_tinny_patch16_224", "did you mean vit_tiny_patch16_224"),
        ("vit_base_patch16_224.mae", "did you mean vit_base_patch16_224"),
        ("resnet5", "did you mean resnet50"),
        ("vit_tiny_patch4_32", r'create_encoder\("vit_tiny_patch16_224", patch_size=4, img_size=32\)'),
        ("vit_base_patch4_32", r'create_encoder\("vit_base_patch16_224", patch_size=4, img_size=32\)'),
        ("qqq", r"unknown encoder 'qqq'; list_encoders\(\) names all"),
    ],
)
def test_unknown_name_is_answered_with_the_nearest(name, answer):
    with pytest.raises(ValueError, match=answer):
        create_encoder(name)


def test_unknown_option_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="vit_tiny_patch16_224: unknown option 'img_siz'; did you mean img_size"):
        create_encoder("vit_tiny_patch16_224", img_siz=32)
    with pytest.raises(ValueError, match="unknown option 'zzz'; it takes img_size, patch_size, in_chans"):
        create_encoder("vit_tiny_patch16_224", zzz=1)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'vit_tiny_patch16_224' is already registered, for VisionTransformer"):
        register_encoders(VisionTransformer, {"vit_tiny_patch16_224": {}})


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "resnet18", "convnext_atto"])
def test_every_family_takes_the_common_options(name):
    with torch.device("meta"):
        encoder = create_encoder(name, in_chans=5, img_size=(64, 96), drop_path_rate=0.1, num_classes=3)
        assert isinstance(encoder, Encoder)
        assert encoder.in_chans == 5
        assert encoder(torch.empty(2, 5, 64, 96)).shape == (2, 3)
        height, width = 64 // encoder.stride, 96 // encoder.stride
        assert encoder.forward_map(torch.empty(2, 5, 64, 96)).shape == (2, encoder.num_features, height, width)
