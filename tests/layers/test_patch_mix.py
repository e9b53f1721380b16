import pytest
import torch

from fastmim.layers import ImagePatchMix, PatchMix, mix_images
from fastmim.models import create_encoder
from fastmim.ops import mixing_map

RNG = torch.tensor([5, 6, 0])


def test_embeds_the_images_that_it_would_mix():
    """The same as a plain patch embedding of mixed images, with timm's keys."""
    torch.manual_seed(0)
    layer = PatchMix((16, 24), 8, embed_dim=12, group_size=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))
    encoder = create_encoder(
        "vit_tiny_patch16_224", img_size=(16, 24), patch_size=8, embed_dim=12, num_heads=3, depth=1
    )
    layer.load_state_dict(encoder.patch_embed.state_dict())
    images = torch.randint(0, 256, (6, 3, 16, 24), dtype=torch.uint8)
    positions = torch.randn(6, 12)
    tokens, mixing = layer(images, RNG, positions)
    mixed = mix_images(images, mixing.segments, (8, 8)).float() / 255
    mean, std = (torch.tensor(s).view(1, 3, 1, 1) for s in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.1)))
    torch.testing.assert_close(tokens, encoder.patch_embed((mixed - mean) / std) + positions, rtol=1e-4, atol=1e-5)
    assert torch.equal(mixing.segments, mixing_map(2, 3, 6, RNG).segments)


def test_full_mixing_gives_a_sequence_for_each_image():
    layer = PatchMix(16, 8, embed_dim=12, group_size=2, full=True)
    images = torch.randn(4, 3, 16, 16)
    tokens, mixing = layer(images, RNG)
    assert tokens.shape == (4, 4, 12)
    mixed = mix_images(images, mixing.segments, (8, 8), full=True)
    expected = layer.proj(mixed).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-5)


def test_without_a_generator_state_every_call_mixes_anew():
    layer, images = PatchMix(32, 4, embed_dim=4), torch.randn(4, 3, 32, 32)
    torch.manual_seed(1)
    first, second = (layer(images)[1].segments for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(layer(images)[1].segments, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_mixed_images_hold_the_patches_of_their_group(dtype):
    images = torch.arange(6 * 3 * 8 * 12).reshape(6, 3, 8, 12).to(dtype)
    segments = mixing_map(2, 3, 6, RNG).segments
    mixed = mix_images(images, segments, (4, 4))
    assert (mixed.shape, mixed.dtype) == ((2, 3, 8, 12), dtype)
    for group in range(2):
        for place in range(6):
            y, x = place // 3 * 4, place % 3 * 4
            source = images[3 * group + int(segments[group, place])]
            assert torch.equal(mixed[group, :, y : y + 4, x : x + 4], source[:, y : y + 4, x : x + 4])


def test_labels_are_mixed_by_the_area_that_is_shown():
    """Images of one colour each, so that a mixed image says itself how much it shows of whom."""
    colours = torch.arange(6.0)
    images = colours.view(6, 1, 1, 1).expand(6, 3, 20, 28)
    labels = torch.tensor([3, 1, 4, 1, 5, 9])
    mix = ImagePatchMix(group_size=3, patch_size=4)  # 35 patches for 3 images: 11 or 12 each
    mixed, (owners, weights) = mix(images, labels, RNG)
    assert mixed.shape == images.shape
    assert (owners.shape, weights.shape) == ((6, 3), (6, 3))
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    for image in range(6):
        group = image // 3 * 3
        for other in range(3):
            assert owners[image, other] == labels[group + other]
            area = (mixed[image] == colours[group + other]).double().mean().item()
            assert weights[image, other].item() == pytest.approx(area)
    assert (mixed[:3].mean(0) - 1).abs().max() < 1e-6, "a patch was lost or shown twice"


def test_soft_labels_are_the_weighted_one_hot_ones():
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([2, 0, 1, 1])
    hard = ImagePatchMix(2, 4)(images, labels, RNG)
    mixed, soft = ImagePatchMix(2, 4, num_classes=3)(images, labels, RNG)
    assert torch.equal(mixed, hard[0])
    expected = torch.zeros(4, 3)
    for image in range(4):
        for owner, weight in zip(hard[1][0][image], hard[1][1][image], strict=True):
            expected[image, owner] += weight
    torch.testing.assert_close(soft, expected)
    torch.testing.assert_close(soft[2:], torch.tensor([[0.0, 1, 0]]).expand(2, -1))
    smooth = ImagePatchMix(2, 4, num_classes=3, label_smoothing=0.3)(images, labels, RNG)[1]
    torch.testing.assert_close(smooth, 0.7 * expected + 0.1)


def test_evaluation_mixes_nothing():
    images, labels = torch.randn(3, 3, 16, 16), torch.tensor([2, 0, 1])
    same, (owners, weights) = ImagePatchMix(2, 4).eval()(images, labels)
    assert same is images
    assert torch.equal(owners, labels[:, None])
    assert torch.equal(weights, torch.ones(3, 1))
    assert torch.equal(ImagePatchMix(2, 4, num_classes=3).eval()(images, labels)[1], torch.eye(3)[labels])


def test_a_gradient_reaches_the_images_that_are_shown():
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    segments = torch.tensor([[0, 1, 1, 0]])
    mix_images(images, segments, (4, 4)).sum().backward()
    shown = torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [1, 0]]]).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(images.grad, shown[:, None].expand(-1, 3, -1, -1))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: PatchMix(15, 4), "15x15 pixels does not divide into patches of 4x4"),
        (lambda: PatchMix(16, 4)(torch.zeros(6, 3, 16, 16)), "PatchMix: a batch of 6 images .* a batch of 4 or 8 does"),
        (lambda: ImagePatchMix(2)(torch.zeros(3, 3, 16, 16), torch.zeros(3)), "ImagePatchMix: a batch of 3 images"),
        (lambda: ImagePatchMix(label_smoothing=0.1), "label_smoothing is of soft labels, which need num_classes"),
        (
            lambda: mix_images(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, dtype=torch.int64), (4, 4)),
            r"segments \[1, 3\] do not fit images of 2x2 patches",
        ),
    ],
)
def test_names_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()
