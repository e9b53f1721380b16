import copy
import logging

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastmim.methods import Batch, create_method
from fastmim.methods.spark import SparK, SparKConfig
from fastmim.models import Encoder, create_encoder
from fastmim.ops import TileIndex
from tests.methods.encoders import small_convnext, small_resnet, small_vit
from tests.methods.masked_cnn import (
    assert_same_loss_and_gradients,
    draw,
    masked_stages,
    normalised_patches,
    removed_of,
    twin,
    wake,
)

SIZE = (96, 64)


def spark(encoder: Encoder, img_size: tuple[int, int] = SIZE, **settings) -> SparK:
    torch.manual_seed(0)
    method = create_method("spark", encoder, SparKConfig(**{"decoder_width": 32, **settings}), img_size)
    assert isinstance(method, SparK)
    return method


def visible_batch_norm(x: Tensor, m: Tensor, norm) -> Tensor:
    """m: [B, 1, h, w], 1 = visible."""
    count = m.sum()
    mean = (x * m).sum((0, 2, 3), keepdim=True) / count
    variance = ((x - mean) ** 2 * m).sum((0, 2, 3), keepdim=True) / count
    normal = (x - mean) / (variance + norm.eps).sqrt()
    return normal * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)


def layer_norm(x: Tensor, norm) -> Tensor:
    return F.layer_norm(x.movedim(1, -1), norm.normalized_shape, norm.weight, norm.bias, 1e-6).movedim(-1, 1)


def batch_norm(x: Tensor, norm) -> Tensor:
    return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=1e-5)


def plain_densify(method: SparK, level: int, stage: Tensor, removed: Tensor) -> Tensor:
    """The map before its projection."""
    part = method.decoder.densify[level]
    visible = (~removed).to(stage.dtype)
    is_bn = hasattr(part.norm, "running_mean")
    normal = visible_batch_norm(stage, visible, part.norm) if is_bn else layer_norm(stage, part.norm)
    return normal * visible + part.mask_embedding.view(1, -1, 1, 1) * (1 - visible)


def plain_loss(method: SparK, images: Tensor, masks) -> Tensor:
    """Sections 2.2 to 2.4 of the paper's algorithm, dense and masked, line by line."""
    decoder = method.decoder
    stages = masked_stages(twin(method.encoder), images, masks, method.grid)
    x: Tensor | float = 0.0
    for level, block in enumerate(decoder.blocks):
        if level < 4:
            stage = stages[3 - level]
            filled = plain_densify(method, level, stage, removed_of(masks, method.grid, tuple(stage.shape[2:])))
            proj = decoder.densify[level].proj
            if hasattr(proj, "weight"):
                filled = F.conv2d(filled, proj.weight, proj.bias, padding=0 if level == 0 else 1)
            x = x + filled
        x = F.conv_transpose2d(x, block.up.weight, block.up.bias, stride=2, padding=1)
        x = batch_norm(F.conv2d(x, block.conv1.weight, padding=1), block.bn1).clamp(0, 6)
        x = batch_norm(F.conv2d(x, block.conv2.weight, padding=1), block.bn2)
    prediction = F.conv2d(x, decoder.proj.weight, decoder.proj.bias)
    batch, channels, height, width = prediction.shape
    cells = prediction.reshape(batch, channels, height // 32, 32, width // 32, 32)
    patches = torch.einsum("bchpwq->bhwpqc", cells).reshape(batch, -1, 32 * 32 * channels)
    per_patch = ((patches - normalised_patches(images, 32)) ** 2).mean(-1)
    return (per_patch * masks.mask).sum() / masks.mask.sum()


@pytest.mark.parametrize(
    "encoder", [small_resnet, small_convnext, lambda: small_convnext(in_chans=1)], ids=["resnet", "convnext", "grey"]
)
def test_loss_and_gradients_equal_the_dense_masked_way_in_fp64(encoder):
    method = wake(spark(encoder()).double().train())
    images, masks = torch.randn(2, method.encoder.in_chans, *SIZE, dtype=torch.float64), draw(method)
    plain = plain_loss(method, images, masks)
    assert_same_loss_and_gradients(method, method.predict_removed(images, masks).loss, plain)


def test_twenty_of_49_cells_are_kept_and_widths_halve():
    with torch.device("meta"):
        method = create_method("spark", create_encoder("resnet50"), None, 224)
    assert (method.num_cells, method.num_keep, method.cell) == (49, 20, 32)
    assert [level.mask_embedding.shape[0] for level in method.decoder.densify] == [2048, 1024, 512, 256]
    assert [level.proj.out_channels for level in method.decoder.densify] == [768, 384, 192, 96]
    assert [level.proj.kernel_size[0] for level in method.decoder.densify] == [1, 3, 3, 3]
    assert [block.up.in_channels for block in method.decoder.blocks] == [768, 384, 192, 96, 48]
    assert method.decoder.proj.in_channels == 24
    assert draw(method).mask.sum(1).tolist() == [29, 29]


def test_small_encoders_have_a_decoder_of_their_width():
    assert spark(small_convnext(), decoder_width=None).decoder.blocks[0].up.in_channels == 32
    with torch.device("meta"):
        method = create_method("spark", create_encoder("resnet18"), None, 96)
    assert method.decoder.blocks[0].up.in_channels == 512


def test_equal_widths_need_no_projection_and_the_decoder_has_23_million_parameters():
    with torch.device("meta"):
        method = create_method("spark", create_encoder("convnext_small"), None, 224)
    assert isinstance(method.decoder.densify[0].proj, torch.nn.Identity)
    blocks = sum(p.numel() for p in (*method.decoder.blocks.parameters(), *method.decoder.proj.parameters()))
    assert blocks / 1e6 == pytest.approx(23, abs=1)


@pytest.mark.parametrize("encoder", [small_resnet, small_convnext])
def test_densified_maps_hold_mask_embeddings_exactly_at_removed_cells(encoder):
    method = wake(spark(encoder()))
    images, masks = torch.randn(2, 3, *SIZE), draw(method)
    tiles = TileIndex.from_ids_keep(masks.ids_keep, method.grid)
    stages = method._on_tiles[0](images, tiles)
    for part, stage in zip(method.decoder.densify, reversed(stages), strict=True):
        dense = part.fill(stage, tiles)
        removed = removed_of(masks, method.grid, tuple(dense.shape[2:])).expand_as(dense)
        embedding = part.mask_embedding.view(1, -1, 1, 1).expand_as(dense)
        assert torch.equal(dense[removed], embedding[removed])
        assert not (dense[~removed] == embedding[~removed]).any()


@pytest.mark.parametrize("settings", [{}, {"decoder": "light"}])
def test_loss_reads_neither_removed_input_pixels_nor_visible_targets(settings):
    method = spark(small_resnet(), **settings)
    images, masks = torch.randn(2, 3, *SIZE), draw(method)
    removed, other = removed_of(masks, method.grid, SIZE), torch.randn(2, 3, *SIZE)
    expected = method.predict_removed(images, masks).loss
    assert method.predict_removed(other.where(removed, images), masks, target=images).loss == expected
    assert method.predict_removed(images, masks, target=other.where(~removed, images)).loss == expected
    assert method.predict_removed(images, masks, target=other.where(removed, images)).loss != expected
    assert method.predict_removed(other.where(~removed, images), masks, target=images).loss != expected


def test_the_light_decoder_is_named_in_the_log_and_small(caplog):
    with caplog.at_level(logging.INFO), torch.device("meta"):
        light = spark(create_encoder("resnet50"), (224, 224), decoder="light", decoder_width=None)
    assert "light decoder" in caplog.text
    assert light.decoder.decoder.pred.in_channels == 512
    assert sum(p.numel() for p in light.decoder.parameters()) < 6e6
    assert light.no_weight_decay() == {"decoder.decoder.mask_token"}


def test_the_encoder_is_named_once_and_has_timms_keys(timm):
    method = spark(create_encoder("resnet18"), (64, 64))
    method(Batch(torch.randn(2, 3, 64, 64), torch.tensor([0, 0, 0]))).loss.backward()
    model = timm.create_model(method.encoder.name, **method.encoder.timm_kwargs)
    model.load_state_dict(method.encoder.state_dict(), strict=True)
    assert {key.split(".")[0] for key in method.state_dict()} == {"encoder", "decoder"}


def test_running_statistics_are_those_of_visible_positions():
    method = spark(small_resnet()).train()
    other = copy.deepcopy(method)
    images, masks = torch.randn(2, 3, *SIZE) + 5.0, draw(method)
    method.predict_removed(images, masks)
    other.predict_removed(images.masked_fill(removed_of(masks, method.grid, SIZE), 1e3), masks)
    for name in ("encoder.bn1", "encoder.layer4.0.bn2", "decoder.densify.0.norm", "decoder.densify.3.norm"):
        norm, twin_norm = method.get_submodule(name), other.get_submodule(name)
        assert torch.equal(norm.running_mean, twin_norm.running_mean), name
        assert torch.equal(norm.running_var, twin_norm.running_var), name
        assert norm.running_mean.any(), name


@pytest.mark.parametrize(
    "encoder, img_size, settings, sentence",
    [
        (lambda: small_vit(64, 8), (64, 64), {}, "is a ViT; choose a resnet"),
        (small_resnet, (96, 80), {}, "width 80 is not divisible by the encoder's stride 32"),
        (small_resnet, (32, 32), {}, "single cell of the encoder's stride 32.*64x64"),
        (small_resnet, (64, 64), {"mask_ratio": 0.05}, "removes none"),
        (small_resnet, (64, 64), {"mask_ratio": 0.99}, "removes all"),
        (small_resnet, (64, 64), {"decoder_width": 48}, "divisible by 32"),
    ],
)
def test_impossible_settings_are_refused(encoder, img_size, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        spark(encoder(), img_size, **settings)
