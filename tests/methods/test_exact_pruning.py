"""Pruned and collapsed steps give the loss and every gradient of the plain ones, to 1e-10 in fp64."""

import dataclasses

import pytest
import torch

from benchmarks.baselines import baseline_of
from fastmim.methods import Method, create_method, method_config
from fastmim.methods.a2mim import FrequencyConfig
from fastmim.methods.masking import token_places
from fastmim.models import create_encoder
from fastmim.models.token_encoder import TokenEncoder
from fastmim.ops import Masks, random_mask

SIZE = (32, 64)
SMALL = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
ENCODERS = {
    "absolute": ("vit_tiny_patch16_224", {}),
    "no positions": ("vit_tiny_patch16_224", {"pos_embed": "none", "init_values": 0.1}),
    "relative": ("beit_base_patch16_224", {}),
    "shared relative": (
        "beit_base_patch16_224",
        {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "use_fc_norm": False, "qkv_bias": False},
    ),
    "absolute and relative": ("beit_base_patch16_224", {"use_abs_pos_emb": True}),
}
CELLS = {"mae": {"decoder_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2}}
CASES = [("mae", "absolute"), *((method, encoder) for method in ("simmim", "a2mim") for encoder in ENCODERS)]


def build(method: str, encoder: str, **settings) -> Method:
    torch.manual_seed(0)
    name, options = ENCODERS[encoder]
    cells = CELLS.get(method, {"mask_patch_size": 16})
    cfg = method_config(method)(**{**cells, **settings})
    model = create_method(method, create_encoder(name, **{**SMALL, **options}), cfg, SIZE).double().train()
    with torch.no_grad():  # zeros at the start (tables, tokens, biases) would hide mistakes
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images_and_masks(model: Method, batch: int = 3) -> tuple[torch.Tensor, Masks]:
    cells = model.grid[0] * model.grid[1]
    images = torch.randn(batch, 3, *SIZE, generator=torch.manual_seed(1), dtype=torch.float64)
    return images, random_mask(batch, cells, model.num_keep, torch.tensor([5, 6, 0]))


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, named.values(), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def compare(ours: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == right.keys()
    for name, gradient in ours.items():
        difference = (gradient - right[name]).abs().max()
        assert difference <= 1e-10 * right[name].abs().max(), f"{name}: {difference} of {right[name].abs().max()}"


@pytest.mark.parametrize("method, encoder", CASES)
def test_loss_and_gradients_are_those_of_the_plain_twin(method, encoder):
    model = build(method, encoder)
    plain, (images, masks) = baseline_of(model), images_and_masks(model)
    plain.eps = 0.0
    ours, theirs = model.predict_removed(images, masks).loss, plain(images, masks.ids_restore.double())
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    compare(gradients(model, ours), gradients(plain, theirs))


@pytest.mark.parametrize("method, encoder", CASES)
def test_pruning_off_is_the_same(method, encoder):
    pruned, whole = build(method, encoder), build(method, encoder, exact_pruning=False)
    images, masks = images_and_masks(pruned)
    losses = [model.predict_removed(images, masks).loss for model in (pruned, whole)]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
    compare(gradients(pruned, losses[0]), gradients(whole, losses[1]))


@pytest.mark.parametrize("encoder", ["no positions", "relative", "shared relative"])
@pytest.mark.parametrize("of_image", [False, True])
def test_one_key_for_all_removed_patches_is_the_same(encoder, of_image):
    model = build("simmim", encoder)
    trunk, (images, masks) = model.encoder, images_and_masks(model)
    assert isinstance(trunk, TokenEncoder)
    token = torch.randn(*((3, 1, 32) if of_image else (32,)), dtype=torch.float64, requires_grad=True)
    places = token_places(masks, model.grid, model.token_grid)
    maps = [trunk.forward_replaced(images, token, *places, collapse_keys=collapse) for collapse in (True, False)]
    torch.testing.assert_close(*maps, rtol=1e-10, atol=1e-11)
    weight = torch.randn_like(maps[0])
    both = [
        gradients(trunk, (m * weight).sum()) | {"token": g}
        for m, g in zip(
            maps, [torch.autograd.grad((m * weight).sum(), token, retain_graph=True)[0] for m in maps], strict=True
        )
    ]
    compare(*both)


@pytest.mark.parametrize("method", ["simmim", "a2mim"])
def test_removed_pixels_are_read_by_the_mean_alone(method):
    model = build(method, "absolute", exact_pruning=True)
    seen = []
    model.encoder.patch_embed.register_forward_hook(lambda _, given, __: seen.append(given[1].shape))
    images, masks = images_and_masks(model)
    model.predict_removed(images, masks)
    assert seen == [(3, 4 * model.num_keep)]  # cells of 2 x 2 tokens


def test_removed_cells_are_removed_tokens():
    masks = random_mask(2, 6, 2, torch.tensor([1, 1, 0]))
    ids_keep, ids_restore = token_places(masks, (2, 3), (4, 9))
    kept = ids_restore < ids_keep.shape[1]
    tokens = kept.view(2, 4, 9)
    assert torch.equal(tokens, ~masks.mask.view(2, 2, 3).repeat_interleave(2, 1).repeat_interleave(3, 2))
    assert torch.equal(ids_restore.sort(1).values, torch.arange(36).expand(2, -1))
    assert torch.equal(ids_restore.gather(1, ids_keep), torch.arange(12).expand(2, -1))


def test_frequency_losses_of_both_forms_are_those_of_the_twin():
    for form in ("paper", "code"):
        model = build("a2mim", "absolute and relative", freq=dataclasses.replace(FrequencyConfig(), form=form))
        plain, (images, masks) = baseline_of(model), images_and_masks(model)
        plain.eps = 0.0
        ours, theirs = model.predict_removed(images, masks).loss, plain(images, masks.ids_restore.double())
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
