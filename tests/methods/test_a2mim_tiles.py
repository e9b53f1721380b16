"""A²MIM with `tiles`, our extension: visible tiles up to the token, everything after it."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastmim.methods import create_method
from fastmim.methods.a2mim import A2MIM, A2MIMConfig, FrequencyConfig
from fastmim.models import Encoder
from tests.methods.encoders import small_convnext, small_resnet, small_vit
from tests.methods.masked_cnn import assert_same_loss_and_gradients, draw, masked_stages, removed_of, twin, wake

SIZE = (64, 96)


def a2mim(encoder: Encoder, img_size: tuple[int, int] = SIZE, **settings) -> A2MIM:
    torch.manual_seed(0)
    cfg = A2MIMConfig(**{"tiles": True, "freq": FrequencyConfig(weight=0.0), **settings})
    method = create_method("a2mim", encoder, cfg, img_size)
    assert isinstance(method, A2MIM)
    return method


def plain_loss(method: A2MIM, images: Tensor, masks, at: int) -> Tensor:
    """Dense and masked up to the token, dense after it."""
    encoder = method.encoder
    is_resnet = hasattr(encoder, "layer1")
    name = ("maxpool" if at == 0 else f"layer{at}") if is_resnet else f"stages.{at}.downsample"
    x = masked_stages(twin(encoder), images, masks, method.grid, names=[name])[0]
    m = removed_of(masks, method.grid, tuple(x.shape[2:])).to(x.dtype)
    x = x * (1 - m) + method.mask_token.token.view(1, -1, 1, 1) * m
    if is_resnet:
        for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4)[at:]:
            x = stage(x)
    else:
        x = encoder.stages[at].blocks(x)
        for stage in list(encoder.stages)[at + 1 :]:
            x = stage(x)
    prediction = F.pixel_shuffle(F.conv2d(x, method.head[0].weight, method.head[0].bias), 32)
    removed = removed_of(masks, method.grid, SIZE).to(x.dtype)
    error = (prediction - images).abs()
    value = error * (2 * torch.sigmoid(0.2 * error) - 1)
    return (value * removed).sum() / removed.sum() / images.shape[1]


@pytest.mark.parametrize("encoder", [small_resnet, small_convnext])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_loss_and_gradients_equal_masking_up_to_the_token_in_fp64(encoder, at):
    method = wake(a2mim(encoder(), mask_layer=at, mask_patch_size=32).double().train())
    images, masks = torch.randn(2, 3, *SIZE, dtype=torch.float64), draw(method)
    plain = plain_loss(method, images, masks, at)
    assert_same_loss_and_gradients(method, method.predict_removed(images, masks).loss, plain)


def test_cells_of_other_sizes_work():
    method = a2mim(small_resnet(), mask_patch_size=16)
    assert method.grid == (4, 6)
    loss = method.predict_removed(torch.randn(2, 3, *SIZE), draw(method)).loss
    loss.backward()
    assert loss.isfinite()
    assert method.mask_token.token.grad.any()


@pytest.mark.parametrize("encoder", [small_resnet, small_convnext])
def test_loss_reads_no_removed_pixels_but_their_targets(encoder):
    method = wake(a2mim(encoder()))
    images, masks = torch.randn(2, 3, *SIZE), draw(method)
    removed, other = removed_of(masks, method.grid, SIZE), torch.randn(2, 3, *SIZE)
    expected = method.predict_removed(images, masks).loss
    assert method.predict_removed(other.where(removed, images), masks, target=images).loss == expected
    assert method.predict_removed(images, masks, target=other.where(removed, images)).loss != expected
    assert method.predict_removed(other.where(~removed, images), masks, target=images).loss != expected


def test_it_is_off_by_default_and_the_method_is_the_papers_without():
    assert A2MIMConfig().tiles is False
    plain = a2mim(small_resnet(), tiles=False)
    assert plain.mask_token.gate is not None
    assert a2mim(small_resnet()).mask_token.gate is None


@pytest.mark.parametrize(
    "encoder, settings, sentence",
    [
        (lambda: small_vit(SIZE, 8), {}, "is a ViT"),
        (small_resnet, {"gate": True}, "leave out method.gate"),
        (small_resnet, {"detach": True}, "leave out method.detach"),
    ],
)
def test_impossible_settings_are_refused(encoder, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        a2mim(encoder(), **settings)
