import math

import pytest
import torch

from fastmim.methods import Batch, create_method
from fastmim.methods.mixedae import MixedAE, MixedAEConfig
from fastmim.models import create_encoder
from fastmim.ops import mixing_map
from tests.methods.encoders import small_resnet
from tests.methods.plain_mixedae import plain_mixedae_loss


def small(img_size=(32, 48), patch_size=8, in_chans=3, depth=3, **settings) -> MixedAE:
    torch.manual_seed(0)
    encoder = create_encoder(
        "vit_tiny_patch16_224",
        img_size=img_size,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=32,
        depth=depth,
        num_heads=2,
    )
    cfg = MixedAEConfig(**{"decoder_dim": 16, "decoder_depth": 2, "decoder_num_heads": 4, **settings})
    method = create_method("mixedae", encoder, cfg, img_size)
    assert isinstance(method, MixedAE)
    return method


def images_for(method: MixedAE, groups: int = 2, dtype=torch.float32):
    shape = (groups * method.cfg.group_size, method.encoder.in_chans, *method.img_size)
    return torch.randn(shape, generator=torch.manual_seed(1), dtype=dtype)


def map_for(method: MixedAE, groups: int = 2):
    return mixing_map(groups, method.cfg.group_size, method.num_patches, torch.tensor([7, 0, 0]))


def stir(method: MixedAE) -> None:
    """Biases, norms and tokens away from 0 and 1, so that each of them matters."""
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def official(method: MixedAE) -> dict:
    return {k.removeprefix("encoder.").removeprefix("decoder."): v for k, v in method.state_dict().items()}


@pytest.mark.parametrize(
    "img_size, patch_size, in_chans, settings",
    [
        ((32, 32), 8, 3, {}),
        ((32, 48), 8, 1, {"group_size": 3, "projector": "mlp", "homo_layers": (0, 2), "norm_pix_loss": False}),
        ((24, 40), 8, 2, {"group_size": 2, "topk_ratio": 0.4, "segment_embedding": "none"}),  # 15 patches for 2 images
        ((32, 32), (8, 4), 3, {"group_size": 5, "exact_pruning": False}),  # 32 patches for 5 images
        ((32, 32), 8, 3, {"exact_pruning": False, "attention": "global"}),
    ],
)
def test_loss_and_every_gradient_equal_the_plain_model_in_fp64(img_size, patch_size, in_chans, settings):
    method = small(img_size, patch_size, in_chans, **settings).double()
    stir(method)
    images, mixing = images_for(method, dtype=torch.float64), map_for(method)
    ours = method.reconstruct(images, mixing).loss
    ours.backward()

    weights = {key: value.clone().requires_grad_() for key, value in official(method).items()}
    cfg, count = method.cfg, method.num_patches
    loss = plain_mixedae_loss(
        weights,
        images,
        mixing.segments,
        group_size=cfg.group_size,
        heads=2,
        decoder_heads=4,
        homo_layers=() if cfg.attention == "global" else tuple(method.homo_layers),
        kept=round(method.topk_ratio * count),
        temperature=cfg.temperature,
        contrastive_weight=cfg.contrastive_weight,
        norm_pix=cfg.norm_pix_loss,
    )
    loss.backward()
    torch.testing.assert_close(ours, loss, rtol=1e-12, atol=0)
    parameters = {
        key.removeprefix("encoder.").removeprefix("decoder."): p
        for key, p in method.named_parameters()
        if p.requires_grad
    }
    compared = [key for key in weights if key in parameters and not key.startswith("head")]
    assert len(compared) > 40
    for key in compared:
        torch.testing.assert_close(
            parameters[key].grad, weights[key].grad, rtol=1e-9, atol=1e-13, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("mixing", ["compose", "full"])
def test_pruning_changes_nothing(mixing):
    results = []
    for pruned in (True, False):
        method = small(exact_pruning=pruned, mixing=mixing).double()
        stir(method)
        loss = method.reconstruct(images_for(method, dtype=torch.float64), map_for(method)).loss
        loss.backward()
        results.append((loss, *(p.grad for p in method.parameters() if p.grad is not None)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_identical_images_reproduce_the_reconstruction_input_of_mae():
    """Mixing is then the identity: the encoder sees the whole image, and each decoder sequence is MAE's for the mask of
    that image, filled from those tokens."""
    method = small(segment_embedding="none", attention="global").eval()
    image = images_for(method, 1)[:1]
    images, mixing = image.expand(4, -1, -1, -1), map_for(method, 1)
    latent, _ = method.encode(images, mixing, mixing.segments)
    torch.testing.assert_close(latent, method.encoder.forward_features(image))
    ids_keep, ids_restore, mask = mixing.masks()
    per_image = torch.cat((latent[:, :1].expand(4, -1, -1), latent[0, 1:][ids_keep]), dim=1)
    expected = method.decoder(per_image, ids_restore)
    torch.testing.assert_close(method.decode(latent, mixing)[mask], expected[mask])


def test_permuting_the_images_of_a_group_with_their_segment_vectors_changes_nothing():
    method = small().eval().double()
    stir(method)
    images, mixing = images_for(method, dtype=torch.float64), map_for(method)
    expected = method.reconstruct(images, mixing).loss
    order = torch.tensor([2, 0, 3, 1])  # new place i holds old image order[i]
    place = order.argsort()
    with torch.no_grad():
        method.segment_embed.copy_(method.segment_embed[order])
    moved = images.unflatten(0, (2, 4))[:, order].flatten(0, 1)
    mask = mixing.mask.unflatten(0, (2, 4))[:, order].flatten(0, 1)
    loss = method.reconstruct(moved, mixing._replace(segments=place[mixing.segments], mask=mask)).loss
    torch.testing.assert_close(loss, expected)


def test_only_positions_that_an_image_does_not_show_are_predicted():
    method = small(contrastive_weight=0.0)
    images, mixing = images_for(method), map_for(method)
    shown = ~mixing.mask.reshape(8, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    expected = method.reconstruct(images, mixing).loss
    visible = torch.where(shown, images, torch.randn_like(images))
    latent, _ = method.encode(images, mixing, mixing.segments)
    other, _ = method.encode(visible, mixing, mixing.segments)
    assert torch.equal(latent, other), "a pixel that no sequence shows was read"
    changed = torch.where(shown, images + 1, images)
    assert method.reconstruct(changed, mixing).loss != expected


def test_full_mixing_of_pairs_predicts_every_position_once():
    method = small(group_size=2, mixing="full", attention="oracle", homo_layers=(0, 1, 2))
    from fastmim.methods.mixedae import _sequences

    images, mixing = images_for(method), map_for(method)
    shown, target = _sequences(images, mixing, True)
    assert shown.segments.shape == (4, method.num_patches)
    assert target.shape == (8, *images.shape[1:])
    assert torch.equal(target, images[[0, 1, 0, 1, 2, 3, 2, 3]])
    assert torch.equal(shown.mask.reshape(2, 2, 2, -1).sum(1), torch.ones(2, 2, method.num_patches, dtype=torch.int64))
    assert "recognition" not in method.reconstruct(images, mixing).parts


def test_oracle_attention_does_not_look_at_other_images():
    """Without cls, what one image's tokens become depends on that image alone."""
    torch.manual_seed(0)
    encoder = create_encoder(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2,
        class_token=False, global_pool="avg",
    )  # fmt: skip
    cfg = MixedAEConfig(attention="oracle", homo_layers=(0, 1), decoder_dim=16, decoder_num_heads=4)
    method = create_method("mixedae", encoder, cfg, 32)
    images, mixing = images_for(method, 1), map_for(method, 1)
    other = images.clone()
    other[1:] = torch.randn_like(other[1:])
    latents = [method.encode(x, mixing, mixing.segments)[0][0] for x in (images, other)]
    first = mixing.segments[0] == 0
    torch.testing.assert_close(latents[0][first], latents[1][first])
    assert not torch.allclose(latents[0][~first], latents[1][~first])


def test_recognition_starts_at_chance_and_is_measured_beside_it():
    method = small((64, 64), 8, segment_embedding="none")
    images = torch.randn(32, 3, 64, 64, generator=torch.manual_seed(0))
    parts = method(Batch(images, torch.tensor([3, 4, 0]))).parts
    assert parts["recognition_chance"].item() == pytest.approx((16 - 1) / (64 - 1))
    assert parts["recognition"].item() == pytest.approx(parts["recognition_chance"].item(), abs=0.03)
    assert set(parts) == {"loss_reconstruction", "loss_contrastive", "recognition", "recognition_chance"}


def test_parts_add_up():
    method = small(contrastive_weight=0.3)
    output = method(Batch(images_for(method), torch.tensor([1, 2, 0])))
    total = output.parts["loss_reconstruction"] + 0.3 * output.parts["loss_contrastive"]
    torch.testing.assert_close(output.loss.detach(), total)
    output = small(contrastive_weight=0.0)(Batch(images_for(method), torch.tensor([1, 2, 0])))
    assert "loss_contrastive" not in output.parts


def test_pictures_show_the_mixed_image_of_each_group():
    method = small()
    images, mixing = images_for(method), map_for(method)
    pictures = method.reconstruct(images, mixing).pictures()
    assert torch.equal(pictures.masked[0], pictures.masked[3])
    assert not torch.equal(pictures.masked[0], pictures.masked[4])
    for place in range(method.num_patches):
        y, x = place // 6 * 8, place % 6 * 8
        source = int(mixing.segments[1, place])
        window = (slice(None), slice(y, y + 8), slice(x, x + 8))
        assert torch.equal(pictures.masked[5][window], images[4 + source][window])


def test_a_clone_of_the_encoder_is_plain():
    """Attention is plain in the exported encoder, with the same keys; nothing of mixing is in it."""
    method = small()
    assert not [key for key in method.encoder.state_dict() if "segment" in key or "projector" in key]
    images = images_for(method)
    fresh = create_encoder(method.encoder.name, **method.encoder.timm_kwargs)
    fresh.load_state_dict(method.encoder.state_dict(), strict=True)
    assert torch.equal(fresh(images), method.encoder(images))


@pytest.mark.parametrize("group_size", [2, 3, 4, 5, 6, 7, 8])
def test_any_group_size_works(group_size):
    method = small(group_size=group_size)
    output = method(Batch(images_for(method), torch.tensor([1, 2, 0])))
    output.loss.backward()
    assert math.isfinite(output.loss.item())


def test_constant_images_give_finite_loss_and_gradients():
    method = small()
    output = method(Batch(torch.full((4, 3, 32, 48), 0.7), torch.tensor([1, 2, 0])))
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_a_batch_that_is_no_whole_number_of_groups_is_refused():
    method = small()
    with pytest.raises(ValueError, match="6 images does not divide into groups of 4; a batch of 4 or 8 does"):
        method(Batch(torch.randn(6, 3, 32, 48), torch.tensor([1, 2, 0])))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"group_size": 1}, "group_size is 1; 2 to 8 images"),
        ({"group_size": 9}, "group_size is 9"),
        ({"img_size": (16, 24), "group_size": 4}, "6 patches among 4 images .* leave less than two"),
        ({"homo_layers": (3,)}, "homo_layers names block 3, but the encoder has blocks 0 to 2"),
        ({"topk_ratio": 1.5}, r"share of the patches that a patch attends to, in \(0, 1\]; got 1.5"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"contrastive_weight": -1.0}, "contrastive_weight is -1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"mixedae: .*{message}"):
        small(**settings)


def test_other_encoders_are_refused():
    with pytest.raises(ValueError, match="resnet18 does not have; choose a vit_"):
        create_method("mixedae", small_resnet(), None, 64)
    beit = create_encoder("beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(ValueError, match="beit_base_patch16_224 does not have"):
        create_method("mixedae", beit, None, 32)
