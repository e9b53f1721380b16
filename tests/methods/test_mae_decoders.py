"""MAE with the cheaper decoders: what they compute, on which patches, and that they learn."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.baselines import baseline_of
from fastmim.methods import Batch, create_method
from fastmim.methods.mae import MAE, MAEConfig
from fastmim.models import create_encoder
from fastmim.ops import patchify, random_mask

SIZE = (32, 48)  # 24 patches, 6 visible
FORMS = [
    {"decoder": "partial"},
    {"decoder": "partial", "decode_ratio": 0.3, "exact_pruning": False},
    {"decoder": "cross"},
    {"decoder": "cross", "cross_feature_maps": False, "decode_ratio": 1.0},
]
forms = pytest.mark.parametrize("form", FORMS, ids=str)


def mae(encoder: str = "vit_tiny_patch16_224", **settings) -> MAE:
    torch.manual_seed(0)
    sizes = {"img_size": SIZE, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    cfg = MAEConfig(**{"decoder_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2, **settings})
    method = create_method("mae", create_encoder(encoder, **sizes), cfg, SIZE)
    assert isinstance(method, MAE)
    return method


def images_and_masks(method: MAE, batch: int = 3, step: int = 0):
    images = torch.randn(batch, 3, *SIZE, generator=torch.manual_seed(1), dtype=next(method.parameters()).dtype)
    return images, random_mask(batch, method.num_patches, method.num_keep, torch.tensor([7, step, 0]))


def decoded_of(method: MAE, masks) -> torch.Tensor:
    """bool [B, N]."""
    rank = masks.ids_restore - method.num_keep
    return (rank >= 0) & (rank < method.num_decoded)


def loss_of_rows(prediction, images, rows):
    target = patchify(images, 8)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return ((prediction - target) ** 2).mean(-1)[rows].mean()


@pytest.mark.parametrize(
    "settings, decoded",
    [({"decoder": "partial"}, 9), ({"decoder": "cross"}, 6), ({}, 18), (FORMS[1], 5), (FORMS[3], 18)],
)
def test_the_decoded_share_is_of_the_removed_patches(settings, decoded):
    assert mae(**settings).num_decoded == decoded


@forms
def test_only_decoded_patches_are_predicted_and_counted(form):
    method = mae(**form).double()
    images, masks = images_and_masks(method)
    decoded = decoded_of(method, masks)
    prediction = method.predict(images, masks)
    assert (prediction[decoded] != 0).any(dim=-1).all()
    assert not prediction[~decoded].any()
    other = images + patch_noise(~decoded)
    output = method.predict_removed(images, masks)
    torch.testing.assert_close(output.loss, loss_of_rows(prediction, images, decoded))
    torch.testing.assert_close(method.predict_removed(images, masks, target=other).loss, output.loss)
    assert output.pictures().reconstruction.isfinite().all()


def patch_noise(patches: torch.Tensor) -> torch.Tensor:
    """[B, 1, H, W], anything where a patch is True."""
    pixels = patches.view(-1, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return torch.randn(pixels.shape, dtype=torch.float64) * pixels


@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_another_part_is_decoded_in_each_step_and_image(form):
    method = mae(**form)
    parts = torch.cat([decoded_of(method, images_and_masks(method, 3, step)[1]) for step in range(20)])
    assert len(parts.unique(dim=0)) == 60
    assert parts.float().mean(0).min() > 0.05


def test_partial_is_the_full_decoder_over_the_sequence_without_the_others():
    method = mae(decoder="partial").double()
    images, masks = images_and_masks(method, batch=2)
    decoder, decoded = method.decoder, decoded_of(method, masks)
    latent = method.encoder.forward_visible(images, masks.ids_keep)
    found = method.predict(images, masks)
    for image in range(2):
        x = decoder.decoder_embed(latent[image])
        places = [*masks.ids_keep[image].tolist(), *decoded[image].nonzero().flatten().tolist()]
        rows = torch.cat((x, decoder.mask_token[0].expand(method.num_decoded, -1)))
        rows = rows + torch.cat((decoder.decoder_pos_embed[0, :1], decoder.decoder_pos_embed[0, 1:][places]))
        for block in decoder.decoder_blocks:
            rows = block(rows[None])[0]
        expected = decoder.decoder_pred(decoder.decoder_norm(rows[7:]))
        torch.testing.assert_close(found[image, decoded[image]], expected, rtol=1e-10, atol=1e-12)


def test_partial_with_everything_decoded_is_the_full_decoder():
    full, partial = mae().double(), mae(decoder="partial", decode_ratio=1.0).double()
    partial.load_state_dict(full.state_dict(), strict=True)
    images, masks = images_and_masks(full)
    losses = [method.predict_removed(images, masks).loss for method in (full, partial)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    gradients = [
        torch.autograd.grad(loss, [p for p in method.parameters() if p.requires_grad])
        for loss, method in zip(losses, (full, partial), strict=True)
    ]
    for ours, right in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-12)


def test_pruning_changes_nothing_in_the_partial_decoder():
    pruned, whole = (mae(decoder="partial", exact_pruning=on).double() for on in (True, False))
    whole.load_state_dict(pruned.state_dict())
    images, masks = images_and_masks(pruned)
    torch.testing.assert_close(pruned.predict(images, masks), whole.predict(images, masks), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("maps", [True, False])
def test_cross_is_attention_to_the_encoder_alone(maps):
    """Written out for one image and one patch at a time: a patch is predicted without regard to the others."""
    method = mae(decoder="cross", cross_feature_maps=maps).double()
    images, masks = images_and_masks(method, batch=2)
    encoder, decoder, found = method.encoder, method.decoder, method.predict(images, masks)
    features = encoder.forward_visible_maps(images, masks.ids_keep)
    assert len(features) == 3
    torch.testing.assert_close(features[-1], encoder.forward_visible(images, masks.ids_keep))
    for image in range(2):
        place = int(decoded_of(method, masks)[image].nonzero()[0])
        x = decoder.mask_token[0] + decoder.decoder_pos_embed[0, place : place + 1]
        for j, block in enumerate(decoder.decoder_blocks):
            memory = features[-1][image]
            if maps:
                mixed = sum(w * feature[image] for w, feature in zip(decoder.feature_weights[j], features, strict=True))
                memory = decoder.feature_norms[j](mixed)
            q = block.attn.q(block.norm1(x)).view(1, 2, 16).transpose(0, 1)
            k, v = block.attn.kv(memory).view(-1, 2, 2, 16).permute(1, 2, 0, 3)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(1, 32)
            x = x + block.attn.proj(attended)
            x = x + block.mlp(block.norm2(x))
        expected = decoder.decoder_pred(decoder.decoder_norm(x))[0]
        torch.testing.assert_close(found[image, place], expected, rtol=1e-10, atol=1e-12)


@forms
@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_every_trained_parameter_gets_a_gradient_under_autocast_too(form, encoder):
    method = mae(encoder, **form)
    images, _ = images_and_masks(method)
    for enabled in (False, True):
        method.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = method(Batch(images, torch.tensor([0, 0, 0])))
        output.loss.backward()
        missing = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
        assert [name for name in missing if "fc_norm" not in name and "encoder.norm" not in name] == []
        assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


@forms
def test_loss_falls_on_one_batch(form):
    method = mae(**form)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    coarse = torch.randn(4, 3, 3, 3, generator=torch.manual_seed(1))
    batch = Batch(F.interpolate(coarse, size=SIZE, mode="bilinear"), torch.tensor([11, 0, 0]))
    losses = []
    for _ in range(30):
        loss = method(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.85 * losses[0], losses[::5]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"decode_ratio": 0.5}, r"decode_ratio 0.5 leaves out patches, which decoder 'full' does not"),
        ({"decoder": "partial", "decode_ratio": 0.0}, "above 0 and at most 1; got 0.0"),
        ({"decoder": "cross", "decode_ratio": 1.1}, "above 0 and at most 1; got 1.1"),
        ({"decoder": "cross", "decoder_dim": 20, "decoder_num_heads": 3}, "width of 20 .* 3 heads"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        mae(**settings)


def test_there_is_no_plain_twin_of_the_cheaper_decoders():
    with pytest.raises(ValueError, match="paper's decoder only, not 'cross'"):
        baseline_of(mae(decoder="cross"))
