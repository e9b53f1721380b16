"""extract_features: what comes out, and that the encoder is left as it was."""

import pytest
import torch

from fastmim.evaluation import extract_features
from fastmim.models import create_encoder


def batches(count=3, size=4, channels=3):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, channels, 32, 32, generator=generator), torch.arange(size) + size * i) for i in range(count)
    ]


@pytest.mark.parametrize("name, options", [("resnet18", {}), ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2})])
def test_pools_the_last_map_or_takes_what_the_classifier_would_get(name, options):
    encoder = create_encoder(name, **options)
    given = batches()
    everything = torch.cat([images for images, _ in given])
    features, labels = extract_features(encoder, given)
    headed, _ = extract_features(encoder, given, pool="head")
    encoder.eval()
    with torch.no_grad():
        torch.testing.assert_close(features, encoder.forward_map(everything).mean(dim=(2, 3)))
        torch.testing.assert_close(headed, encoder(everything))
    assert labels.tolist() == list(range(12))
    assert features.dtype == torch.float32


def test_leaves_modes_statistics_and_gradients_as_they_were():
    encoder = create_encoder("resnet18")
    encoder.layer1.eval()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    features, _ = extract_features(encoder, batches())
    assert not features.requires_grad
    assert (encoder.training, encoder.layer1.training, encoder.layer2.training) == (True, False, True)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_batch_size_does_not_matter_and_bf16_is_close():
    encoder = create_encoder("convnext_atto")
    given = batches()
    whole = [(torch.cat([images for images, _ in given]), torch.cat([labels for _, labels in given]))]
    features, _ = extract_features(encoder, given)
    torch.testing.assert_close(extract_features(encoder, whole)[0], features, atol=1e-5, rtol=1e-5)
    half, _ = extract_features(encoder, whole, precision="bf16")
    assert torch.cosine_similarity(half, features).min() > 0.99


def test_images_without_labels():
    features, labels = extract_features(create_encoder("resnet18"), [(torch.zeros(2, 3, 32, 32), None)])
    assert features.shape == (2, 512)
    assert labels is None


def test_says_when_there_is_nothing_to_measure():
    encoder = create_encoder("resnet18")
    with pytest.raises(ValueError, match="no images"):
        extract_features(encoder, [])
    torch.nn.init.constant_(encoder.bn1.bias, float("nan"))
    with pytest.raises(ValueError, match="4 of 4 images are not finite"):
        extract_features(encoder, batches(1))
    assert encoder.training
