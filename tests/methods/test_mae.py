import pytest
import torch
from torch import Tensor

from fastmim.methods import Batch, create_method
from fastmim.methods.mae import MAE, MAEConfig, official_key
from fastmim.methods.reconstruction import patch_pictures
from fastmim.models import create_encoder
from fastmim.ops import patchify, random_mask
from tests.methods.plain_mae import plain_mae_loss


def small_mae(
    img_size: tuple[int, int] = (32, 48), patch_size: int | tuple[int, int] = 8, in_chans: int = 3, **settings
) -> MAE:
    torch.manual_seed(0)
    encoder = create_encoder(
        "vit_tiny_patch16_224",
        img_size=img_size,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=32,
        depth=2,
        num_heads=2,
    )
    cfg = MAEConfig(**{"decoder_dim": 16, "decoder_depth": 2, "decoder_num_heads": 4, **settings})
    method = create_method("mae", encoder, cfg, img_size)
    assert isinstance(method, MAE)
    return method


def images_for(method: MAE, batch: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, method.encoder.in_chans, *method.img_size, generator=torch.manual_seed(1), dtype=dtype)


def rng(step: int = 0) -> Tensor:
    return torch.tensor([7, step, 0])


@pytest.mark.parametrize("exact_pruning", [True, False])
@pytest.mark.parametrize("norm_pix, depth", [(True, 2), (False, 3), (True, 1)])
@pytest.mark.parametrize(
    "img_size, patch_size, in_chans", [((32, 32), 8, 3), ((24, 48), 8, 1), ((32, 40), (8, 4), 2), ((28, 28), 7, 3)]
)
def test_loss_and_every_gradient_equal_the_plain_model_in_fp64(
    img_size, patch_size, in_chans, norm_pix, depth, exact_pruning
):
    method = small_mae(
        img_size, patch_size, in_chans, norm_pix_loss=norm_pix, decoder_depth=depth, exact_pruning=exact_pruning
    ).double()
    with torch.no_grad():  # biases and norms away from 0 and 1, so that each of them matters
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    images = images_for(method, dtype=torch.float64)
    masks = random_mask(3, method.num_patches, method.num_keep, rng())
    method.predict_removed(images, masks).loss.double().backward()

    state = {key.removeprefix("encoder.").removeprefix("decoder."): value for key, value in method.state_dict().items()}
    weights = {key: value.clone().requires_grad_() for key, value in state.items()}
    loss = plain_mae_loss(weights, images, *masks, heads=2, decoder_heads=4, norm_pix=norm_pix)
    loss.backward()

    ours = method.predict_removed(images, masks).loss
    torch.testing.assert_close(ours, loss, rtol=1e-12, atol=0)
    parameters = dict(method.named_parameters())
    for key, weight in weights.items():
        parameter = parameters[official_key(key)]
        if parameter.requires_grad:
            torch.testing.assert_close(
                parameter.grad, weight.grad, rtol=1e-10, atol=1e-13, msg=lambda m, key=key: f"gradient of {key}: {m}"
            )


def test_keeps_49_of_196_and_removes_147():
    encoder = create_encoder("vit_tiny_patch16_224", embed_dim=32, depth=1, num_heads=2)
    method = create_method("mae", encoder, None, 224)
    masks = random_mask(5, method.num_patches, method.num_keep, rng())
    assert masks.ids_keep.shape == (5, 49)
    assert masks.mask.sum(1).tolist() == [147] * 5
    assert method.decoder.decoder_blocks[0].attn.num_heads * 32 == method.decoder.mask_token.shape[-1]


def test_restoring_undoes_the_shuffle():
    masks = random_mask(4, 24, 6, rng())
    for keep, restore, mask in zip(*masks, strict=True):
        assert restore[keep].tolist() == list(range(6))
        assert sorted(restore.tolist()) == list(range(24))
        assert not mask[keep].any()


def test_loss_reads_neither_targets_at_visible_patches_nor_pixels_at_removed_ones():
    method = small_mae((32, 48), 8)
    images = images_for(method)
    masks = random_mask(3, method.num_patches, method.num_keep, rng())
    removed = masks.mask.reshape(3, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.randn_like(images)
    expected = method.predict_removed(images, masks).loss
    assert method.predict_removed(images, masks, target=other.where(~removed, images)).loss == expected
    assert method.predict_removed(other.where(removed, images), masks, target=images).loss == expected
    assert method.predict_removed(images, masks, target=other.where(removed, images)).loss != expected


def test_pruning_leaves_out_what_it_says():
    """Rows that enter the linear layers of the decoder, for 24 patches of which 6 are visible, and cls."""
    rows = {}
    for pruned in (True, False):
        method, counts = small_mae(exact_pruning=pruned, decoder_depth=3), {}
        for name, module in method.decoder.named_modules():
            if (
                name.startswith("decoder_blocks") and name.endswith(("fc1", "proj", "norm1"))
            ) or name == "decoder_pred":
                module.register_forward_hook(
                    lambda _, x, __, name=name, counts=counts: counts.update({name: x[0].numel() // x[0].shape[-1]})
                )
        method(Batch(images_for(method, 4), rng()))
        rows[pruned] = counts
    everything = 4 * 25
    blocks = {f"decoder_blocks.{i}.{part}": everything for i in range(3) for part in ("norm1", "attn.proj", "mlp.fc1")}
    assert rows[False] == blocks | {"decoder_pred": 4 * 24}
    last = dict.fromkeys(("decoder_blocks.2.attn.proj", "decoder_blocks.2.mlp.fc1", "decoder_pred"), 4 * 18)
    assert rows[True] == blocks | last | {"decoder_blocks.0.norm1": 24}  # visible rows first, then one per position


def test_constant_images_give_finite_loss_and_gradients():
    method = small_mae(norm_pix_loss=True)
    output = method(Batch(torch.full((2, 3, 32, 48), 0.7), rng()))
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
    assert output.pictures().reconstruction.isfinite().all()


def test_perfect_prediction_of_normalised_patches_reconstructs_the_image():
    method = small_mae(norm_pix_loss=True)
    images = images_for(method)
    masks = random_mask(3, method.num_patches, method.num_keep, rng())
    patches = patchify(images, 8)
    perfect = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    pictures = patch_pictures(images, perfect, masks.mask, (8, 8), norm_pix=True)
    torch.testing.assert_close(pictures.reconstruction, images)
    assert (pictures.masked == 0).sum() >= masks.mask.sum() * 64 * 3


def official_state_dict(width: int = 32, depth: int = 2, dim: int = 16, patch: int = 8, patches: int = 24) -> dict:
    """Names and shapes as the official code stores them."""

    def transformer(prefix: str, w: int) -> dict:
        return {
            f"{prefix}.norm1.weight": (w,),
            f"{prefix}.norm1.bias": (w,),
            f"{prefix}.attn.qkv.weight": (3 * w, w),
            f"{prefix}.attn.qkv.bias": (3 * w,),
            f"{prefix}.attn.proj.weight": (w, w),
            f"{prefix}.attn.proj.bias": (w,),
            f"{prefix}.norm2.weight": (w,),
            f"{prefix}.norm2.bias": (w,),
            f"{prefix}.mlp.fc1.weight": (4 * w, w),
            f"{prefix}.mlp.fc1.bias": (4 * w,),
            f"{prefix}.mlp.fc2.weight": (w, 4 * w),
            f"{prefix}.mlp.fc2.bias": (w,),
        }

    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + patches, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "decoder_embed.weight": (dim, width),
        "decoder_embed.bias": (dim,),
        "mask_token": (1, 1, dim),
        "decoder_pos_embed": (1, 1 + patches, dim),
        "decoder_norm.weight": (dim,),
        "decoder_norm.bias": (dim,),
        "decoder_pred.weight": (patch * patch * 3, dim),
        "decoder_pred.bias": (patch * patch * 3,),
    }
    for index in range(depth):
        shapes |= transformer(f"blocks.{index}", width) | transformer(f"decoder_blocks.{index}", dim)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_loads_a_checkpoint_with_the_official_names():
    method, official = small_mae(), official_state_dict()
    method.load_official(official)
    state = method.state_dict()
    assert len(state) == len(official)
    for key, value in official.items():
        assert torch.equal(state[official_key(key)], value), key


def test_loads_an_official_encoder_alone_and_names_what_is_missing():
    method, official = small_mae(), official_state_dict()
    token = method.decoder.mask_token.clone()
    encoder_only = {k: v for k, v in official.items() if not k.startswith("decoder") and k != "mask_token"}
    method.load_official(encoder_only)
    assert torch.equal(method.encoder.cls_token, official["cls_token"])
    assert torch.equal(method.decoder.mask_token, token)
    del encoder_only["blocks.1.attn.qkv.bias"]
    with pytest.raises(RuntimeError, match=r"encoder\.blocks\.1\.attn\.qkv\.bias"):
        method.load_official(encoder_only)


def test_initialisation_is_the_official_one():
    method = small_mae((64, 64), 8)
    encoder = method.encoder
    weight = encoder.blocks[0].attn.qkv.weight
    bound = (6 / sum(weight.shape)) ** 0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert encoder.blocks[0].mlp.fc1.bias.abs().max() == 0
    assert encoder.patch_embed.proj.weight.abs().max() <= (6 / (32 + 192)) ** 0.5
    assert not encoder.pos_embed.requires_grad
    assert encoder.pos_embed[0, 0].abs().max() == 0
    assert 0 < method.decoder.mask_token.std().item() < 0.06
    position = encoder.pos_embed[0, 1 + 8 * 2 + 3]  # row 2, column 3: columns fill the first half
    frequency = 10000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
    expected = [(3 * frequency).sin(), (3 * frequency).cos(), (2 * frequency).sin(), (2 * frequency).cos()]
    torch.testing.assert_close(position, torch.cat(expected).float())


def test_keeps_an_encoder_that_comes_with_its_weights():
    torch.manual_seed(0)
    encoder = create_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    create_method("mae", encoder, MAEConfig(init_encoder=False), 32)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_beit_encoders_with_relative_positions_work():
    encoder = create_encoder(
        "beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, use_fc_norm=False
    )
    output = create_method("mae", encoder, None, 32)(Batch(torch.randn(2, 3, 32, 32), rng()))
    output.loss.backward()
    assert output.loss.isfinite()


def test_a_cnn_is_refused():
    with pytest.raises(ValueError, match="resnet18 does not; choose a vit_"):
        create_method("mae", create_encoder("resnet18"), None, 64)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1 - 1 / 25, 1.5, -0.1])
def test_ratios_that_remove_nothing_or_everything_are_refused(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        small_mae(mask_ratio=ratio)


def test_an_image_of_one_patch_is_refused():
    with pytest.raises(ValueError, match="removes all 1 cells"):
        small_mae((8, 8), 8)


def test_an_encoder_of_another_size_is_refused():
    encoder = create_encoder("vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(ValueError, match=r"32x32 pixels.*64x64.*same img_size"):
        create_method("mae", encoder, None, 32)


def test_a_decoder_width_that_its_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"width of 20 .* 3 heads"):
        small_mae(decoder_dim=20, decoder_num_heads=3)
