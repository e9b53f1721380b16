import pytest
import torch
from torch import Tensor

import fastmim.methods.a2mim as a2mim_module
from fastmim.methods import Batch, create_method
from fastmim.methods.a2mim import A2MIM, A2MIMConfig, FrequencyConfig, mean_fill
from fastmim.models import Encoder
from fastmim.ops import random_mask
from tests.methods.encoders import small_convnext, small_resnet, small_vit

CODE = {"form": "code", "weight": 0.5, "visible_weight": 1e-3}


def a2mim(encoder: Encoder, img_size: tuple[int, int], freq: dict | None = None, **settings) -> A2MIM:
    torch.manual_seed(0)
    cfg = A2MIMConfig(freq=FrequencyConfig(**(freq or {})), **settings)
    method = create_method("a2mim", encoder, cfg, img_size)
    assert isinstance(method, A2MIM)
    return method


def draw(method: A2MIM, batch: int = 3):
    return random_mask(batch, method.num_cells, method.num_keep, torch.tensor([3, 5, 0]))


def pixels(method: A2MIM, mask: Tensor) -> Tensor:
    cells = mask.reshape(-1, 1, *method.grid)
    return cells.repeat_interleave(method.cell, 2).repeat_interleave(method.cell, 3)


def plain_spatial(error: Tensor, m: Tensor, focal: bool) -> Tensor:
    value = error.abs() * (2 * torch.sigmoid(0.2 * error.abs()) - 1) if focal else error.abs()
    return (value * m).sum() / (m.sum() + 1e-5) / error.shape[1]


def plain_frequency(prediction: Tensor, image: Tensor, m: Tensor, freq: dict, focal_l1: bool) -> Tensor:
    """Compose, transform, compare: section 3 of the specification, line by line."""
    seen = m + (1 - m) * freq.get("visible_weight", 0.0)
    fixed = prediction.detach()
    form = freq.get("form", "paper")
    other = fixed if form == "paper" else 0.5 * fixed + 0.5 * image
    spectrum = torch.fft.fft2(prediction * seen + other * (1 - seen), norm="ortho")
    truth = torch.fft.fft2(image, norm="ortho")
    if form == "code" and freq.get("focal", True):
        squared = (spectrum.mean(0) - truth.mean(0)).abs() ** 2
        weight = torch.log(1 + squared.detach().sqrt())
        return ((weight / weight.max()).clamp(0, 1) * squared).mean()
    difference = spectrum - truth
    if form == "code":
        value = difference.abs()
        return (value * (2 * torch.sigmoid(0.2 * value) - 1) if focal_l1 else value).mean()
    weight = difference.detach().abs()
    weight = weight / weight.amax(dim=(1, 2, 3), keepdim=True)
    return (weight * difference.abs() ** 2).mean(dim=(1, 2, 3)).mean()


NOT_FOCAL = {**CODE, "focal": False}


@pytest.mark.parametrize(
    "family, img_size, in_chans, freq",
    [
        (small_vit, (32, 48), 3, {}),
        (small_vit, (48, 32), 1, CODE),
        (small_vit, (32, 32), 3, NOT_FOCAL),
        (small_resnet, (32, 64), 3, CODE),
        (small_resnet, (64, 32), 1, NOT_FOCAL),
        (small_convnext, (64, 96), 3, {}),
        (small_convnext, (64, 64), 1, CODE),
    ],
)
def test_loss_and_gradients_equal_the_plain_composition_in_fp64(family, img_size, in_chans, freq):
    is_vit = family is small_vit
    encoder = family(img_size, 8, in_chans=in_chans) if is_vit else family(in_chans=in_chans)
    method = a2mim(encoder, img_size, freq, gate_init=0.4).double()
    images, masks = torch.randn(2, in_chans, *img_size, dtype=torch.float64), draw(method, 2)
    m = pixels(method, masks.mask).double()
    filled = images * (1 - m) + images.mean(dim=(2, 3), keepdim=True) * m
    step = img_size[0] // method.token_grid[0]
    at_tokens = m[:, :, ::step, ::step]
    token, gate = method.mask_token.token, method.mask_token.gate
    if is_vit:
        removed = at_tokens.flatten(2).transpose(1, 2)
        features = encoder.forward_map(filled, lambda x: x + token * removed)
    else:
        t, g = token.view(1, -1, 1, 1), gate.view(1, -1, 1, 1)
        features = encoder.forward_map(filled, lambda x: x * (1 - at_tokens) + g * x * at_tokens + t * at_tokens)
    prediction = torch.pixel_shuffle(method.head[0](features), encoder.stride)
    spatial = plain_spatial(prediction - images, m, focal=not is_vit)
    frequency = plain_frequency(prediction, images, m, freq, focal_l1=not is_vit)
    expected = spatial + 0.5 * frequency

    output = method.predict_removed(images, masks)
    torch.testing.assert_close(output.loss.double(), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(output.parts["loss_spatial"].double(), spatial.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(output.parts["loss_frequency"].double(), frequency.detach(), rtol=1e-5, atol=0)
    named = {name: p for name, p in method.named_parameters() if "encoder.head" not in name}
    ours = torch.autograd.grad(output.loss, list(named.values()))
    plain = torch.autograd.grad(expected, list(named.values()))
    for name, one, other in zip(named, ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    "family, side, token_grid, channels, gated",
    [
        (lambda: small_vit(224, 16, depth=1), 224, (14, 14), 32, False),
        (small_resnet, 224, (14, 14), 256, True),
        (small_convnext, 224, (7, 7), 32, True),
    ],
    ids=["vit", "resnet", "convnext"],
)
def test_defaults_are_those_of_the_papers_table(family, side, token_grid, channels, gated):
    method = a2mim(family(), (side, side))
    assert (method.cell, method.grid, method.num_keep) == (32, (7, 7), 19)
    assert draw(method).mask.sum(1).tolist() == [30, 30, 30]
    assert method.token_grid == token_grid
    assert method.mask_token.token.shape == (channels,)
    assert (method.mask_token.gate is not None) == gated
    assert method.loss == ("focal_l1" if gated else "l1")
    if gated:
        assert torch.equal(method.mask_token.gate, torch.full((channels,), 1e-6))


@pytest.mark.parametrize(
    "mask_layer, channels, grid", [(0, 64, (16, 24)), (1, 64, (16, 24)), (2, 128, (8, 12)), (3, 256, (4, 6))]
)
def test_the_token_can_enter_at_every_stage(mask_layer, channels, grid):
    method = a2mim(small_resnet(), (64, 96), mask_layer=mask_layer, mask_patch_size=16)
    output = method(Batch(torch.randn(2, 3, 64, 96), torch.tensor([0, 0, 0])))
    output.loss.backward()
    assert method.mask_token.token.shape == (channels,)
    assert method.token_grid == grid
    assert method.mask_token.token.grad.abs().sum() > 0
    assert method.mask_token.gate.grad.isfinite().all()


@pytest.mark.parametrize("family, img_size", [(small_resnet, (64, 96)), (small_convnext, (96, 64))])
def test_with_gate_and_token_zero_features_at_removed_cells_do_not_matter(family, img_size):
    method = a2mim(family(), img_size).eval()
    with torch.no_grad():
        method.mask_token.token.zero_()
        method.mask_token.gate.zero_()
    images, masks = torch.randn(2, 3, *img_size), draw(method, 2)
    expected = method.predict_removed(images, masks)

    def perturb(module, args, kwargs):
        removed = kwargs["removed"].unsqueeze(1)
        return (args[0] + 10 * torch.randn_like(args[0]) * removed,), kwargs

    method.mask_token.register_forward_pre_hook(perturb, with_kwargs=True)
    perturbed = method.predict_removed(images, masks)
    assert perturbed.loss == expected.loss
    assert torch.equal(perturbed.pictures().reconstruction, expected.pictures().reconstruction)


def test_fill_is_the_mean_of_the_whole_image_and_leaves_visible_pixels():
    images = torch.randn(2, 3, 8, 8)
    removed = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    removed[0, :, :4], removed[1, :, :, 4:] = True, True
    filled = mean_fill(images, removed)
    assert torch.equal(filled[0, :, 4:], images[0, :, 4:])
    assert torch.equal(filled[1, :, :, :4], images[1, :, :, :4])
    for channel in range(3):
        torch.testing.assert_close(filled[0, channel, :4], images[0, channel].mean().expand(4, 8))


def test_the_encoder_sees_of_removed_pixels_no_more_than_their_mean():
    method = a2mim(small_resnet(), (64, 96)).eval()
    images, masks = torch.randn(2, 3, 64, 96), draw(method, 2)
    removed = pixels(method, masks.mask)
    scrambled = images.clone()
    for image in range(2):
        values = images[image, :, removed[image, 0]]
        scrambled[image, :, removed[image, 0]] = values.flip(1)  # the same pixels at other places: the same mean
    one = method.predict_removed(images, masks)
    other = method.predict_removed(scrambled, masks, target=images)
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-5, atol=1e-7)


def test_pixel_loss_does_not_read_targets_at_visible_pixels():
    method = a2mim(small_vit((32, 48), 8), (32, 48), {"weight": 0.0})
    images, masks = torch.randn(2, 3, 32, 48), draw(method, 2)
    removed = pixels(method, masks.mask)
    other = torch.randn_like(images)
    expected = method.predict_removed(images, masks).loss
    assert method.predict_removed(images, masks, target=other.where(~removed, images)).loss == expected
    assert method.predict_removed(images, masks, target=other.where(removed, images)).loss != expected


def test_lambda_zero_makes_no_fourier_transform(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("the Fourier loss was computed")

    monkeypatch.setattr(a2mim_module, "frequency_loss", forbidden)
    method = a2mim(small_vit(32, 8), (32, 32), {"weight": 0.0})
    output = method(Batch(torch.randn(2, 3, 32, 32), torch.tensor([0, 0, 0])))
    assert set(output.parts) == {"loss_spatial"}
    assert output.loss == output.parts["loss_spatial"]


def test_token_and_gate_may_learn_more_slowly():
    method = a2mim(small_resnet(), (64, 64), token_lr_scale=0.1, gate_lr_scale=0.2)
    assert method.lr_scales() == {"mask_token.token": 0.1, "mask_token.gate": 0.2}
    assert a2mim(small_vit(32, 8), (32, 32), token_lr_scale=0.1, gate_lr_scale=0.2).lr_scales() == {
        "mask_token.token": 0.1
    }
    assert a2mim(small_resnet(), (64, 64)).lr_scales() == {}


def test_parameters_without_decay_exist_and_include_the_encoders():
    method = a2mim(small_vit(32, 8), (32, 32))
    assert {"encoder.pos_embed", "encoder.cls_token"} <= method.no_weight_decay()
    assert method.no_weight_decay() <= dict(method.named_parameters()).keys()


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"mask_ratio": 0.0}, "removes none of the 16 cells"),
        ({"mask_ratio": 1.0}, "removes all 16 cells"),
        ({"mask_layer": 7}, "points 0 to 1"),
        ({"mask_patch_size": 20}, "not a multiple of the 8 pixels"),
        ({"freq": {"weight": -1.0}}, "freq.weight"),
        ({"freq": {"visible_weight": 2.0}}, "freq.visible_weight"),
        ({"freq": {"form": "code", "distance": "modulus"}}, "belong to form 'paper'"),
    ],
)
def test_impossible_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        a2mim(small_vit(32, 8), (32, 32), **settings)


def test_an_image_of_one_cell_is_refused():
    with pytest.raises(ValueError, match="removes all 1 cells"):
        a2mim(small_convnext(), (32, 32))
