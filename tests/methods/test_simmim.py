import pytest
import torch

from fastmim.methods import Batch, create_method
from fastmim.methods.simmim import SimMIM, SimMIMConfig
from fastmim.models import Encoder, create_encoder
from fastmim.ops import random_mask
from tests.methods.encoders import small_convnext, small_resnet, small_vit


def simmim(encoder: Encoder, img_size: tuple[int, int], **settings) -> SimMIM:
    torch.manual_seed(0)
    method = create_method("simmim", encoder, SimMIMConfig(**settings), img_size)
    assert isinstance(method, SimMIM)
    return method


def draw(method: SimMIM, batch: int = 2):
    return random_mask(batch, method.num_cells, method.num_keep, torch.tensor([3, 5, 0]))


def pixels(method: SimMIM, mask: torch.Tensor) -> torch.Tensor:
    rows, columns = method.grid
    cells = mask.reshape(-1, 1, rows, columns)
    return cells.repeat_interleave(method.cell, 2).repeat_interleave(method.cell, 3)


@pytest.mark.parametrize("side, cells, removed", [(224, 49, 30), (192, 36, 22)])
def test_removes_30_of_49_and_22_of_36(side, cells, removed):
    method = simmim(small_vit(side, 16, depth=1), (side, side))
    assert (method.cell, method.num_cells) == (32, cells)
    assert draw(method).mask.sum(1).tolist() == [removed, removed]


@pytest.mark.parametrize("mask_layer", [0, 1])
def test_equals_the_plain_composition_in_fp64(mask_layer):
    method = simmim(small_vit((32, 48), 8), (32, 48), mask_layer=mask_layer, mask_patch_size=16).double()
    images, masks = torch.randn(2, 3, 32, 48, dtype=torch.float64), draw(method)
    m = pixels(method, masks.mask).double()
    encoder = method.encoder
    removed = m[:, 0, ::8, ::8].flatten(1).unsqueeze(-1)

    tokens = encoder.patch_embed(images)
    if mask_layer == 0:
        tokens = tokens * (1 - removed) + method.mask_token.token * removed
    x = torch.cat((encoder.cls_token.expand(2, -1, -1), tokens), dim=1) + encoder.pos_embed
    x = encoder.blocks[0](x)
    if mask_layer == 1:
        x = torch.cat((x[:, :1], x[:, 1:] * (1 - removed) + method.mask_token.token * removed), dim=1)
    x = encoder.norm(encoder.blocks[1](x))[:, 1:]
    weight, bias = method.head[0].weight.flatten(1), method.head[0].bias
    values = (x @ weight.T + bias).reshape(2, 4, 6, 3, 8, 8)  # PixelShuffle: channel, row, column within the cell
    prediction = values.permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 48)
    expected = ((prediction - images).abs() * m).sum() / (m.sum() + 1e-5) / 3

    loss = method.predict_removed(images, masks).loss
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    parameters = [p for p in method.parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss, parameters)
    for gradient, plain in zip(ours, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-6, atol=1e-10)


def test_loss_reads_neither_removed_input_pixels_nor_visible_targets():
    method = simmim(small_vit((32, 48), 8), (32, 48))
    images, masks = torch.randn(2, 3, 32, 48), draw(method)
    removed = pixels(method, masks.mask)
    other = torch.randn_like(images)
    expected = method.predict_removed(images, masks).loss
    assert method.predict_removed(other.where(removed, images), masks, target=images).loss == expected
    assert method.predict_removed(images, masks, target=other.where(~removed, images)).loss == expected
    assert method.predict_removed(images, masks, target=other.where(removed, images)).loss != expected


@pytest.mark.parametrize("encoder, img_size", [(small_resnet, (64, 96)), (small_convnext, (96, 64))])
@pytest.mark.parametrize("mask_layer", [0, 3])
def test_cnns_are_masked_after_the_stem_or_at_a_later_stage(encoder, img_size, mask_layer):
    method = simmim(encoder(in_chans=1), img_size, mask_layer=mask_layer)
    output = method(Batch(torch.randn(2, 1, *img_size), torch.tensor([0, 0, 0])))
    output.loss.backward()
    assert output.loss.isfinite()
    assert method.mask_token.token.grad.abs().sum() > 0
    assert method.token_grid == tuple(side // encoder().insertion(mask_layer).stride for side in img_size)


def test_replaced_features_get_no_gradient():
    method = simmim(small_vit(32, 8), (32, 32), mask_patch_size=8, exact_pruning=False)
    masks = draw(method)
    kept = {}
    hook = method.mask_token.register_forward_pre_hook(
        lambda module, args: kept.update(x=args[0]) or args[0].retain_grad()
    )
    method.predict_removed(torch.randn(2, 3, 32, 32), masks).loss.backward()
    hook.remove()
    per_token = kept["x"].grad.abs().sum(-1)
    assert (per_token[masks.mask] == 0).all()
    assert (per_token[~masks.mask] > 0).all()


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"mask_ratio": 0.0}, "removes none"),
        ({"mask_ratio": 1.0}, "removes all"),
        ({"mask_ratio": 0.99}, "removes all"),
        ({"mask_patch_size": 12}, "not a multiple of the 8 pixels"),
        ({"mask_patch_size": 24}, "height 32 is not divisible by mask_patch_size 24"),
        ({"mask_patch_size": 32}, "removes all 1 cells"),
        ({"mask_layer": 2}, "points 0 to 1"),
    ],
)
def test_impossible_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        simmim(small_vit(32, 8), (32, 32), **settings)


def test_an_image_that_the_stride_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="width 80 is not divisible by the encoder's stride 32"):
        simmim(small_resnet(), (96, 80))


def test_rectangular_patches_are_refused():
    with pytest.raises(ValueError, match="square patches"):
        simmim(small_vit((32, 32), (8, 4)), (32, 32))  # type: ignore[arg-type]


def test_images_of_another_size_are_refused():
    method = simmim(create_encoder("resnet18"), (64, 64))
    with pytest.raises(ValueError, match="64x64 pixels, got 96x64"):
        method(Batch(torch.randn(1, 3, 96, 64), torch.tensor([0, 0, 0])))
