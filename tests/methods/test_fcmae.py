import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastmim.methods import Batch, create_method
from fastmim.methods.fcmae import FCMAE, FCMAEConfig, official_weights
from fastmim.models import Encoder, create_encoder
from fastmim.ops import TileIndex
from tests.methods.encoders import small_convnextv2, small_resnet, small_vit
from tests.methods.masked_cnn import (
    assert_same_loss_and_gradients,
    draw,
    masked_stages,
    normalised_patches,
    removed_of,
    twin,
    wake,
)

SIZE = (64, 96)


def small_named(name: str, **kwargs) -> Encoder:
    return create_encoder(name, **{"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24), **kwargs})


def fcmae(encoder: Encoder, img_size: tuple[int, int] = SIZE, **settings) -> FCMAE:
    torch.manual_seed(0)
    method = create_method("fcmae", encoder, FCMAEConfig(**{"decoder_dim": 20, **settings}), img_size)
    assert isinstance(method, FCMAE)
    return method


def plain_decoder(method: FCMAE, last: Tensor, masks) -> Tensor:
    """Features [B, C, h, w] -> patches [B, N, P]."""
    decoder = method.decoder
    m = masks.mask.reshape(-1, 1, *method.grid).to(last.dtype)
    x = F.conv2d(last, decoder.proj.weight, decoder.proj.bias) * (1 - m) + decoder.mask_token * m
    for block in decoder.blocks:
        y = F.conv2d(x, block.conv_dw.weight, block.conv_dw.bias, padding=3, groups=x.shape[1]).permute(0, 2, 3, 1)
        y = F.layer_norm(y, y.shape[-1:], block.norm.weight, block.norm.bias, 1e-6)
        y = F.gelu(F.linear(y, block.mlp.fc1.weight, block.mlp.fc1.bias))
        response = y.square().sum((1, 2), keepdim=True).sqrt()
        y = block.mlp.grn.weight * y * (response / (response.mean(-1, keepdim=True) + 1e-6)) + block.mlp.grn.bias + y
        x = x + F.linear(y, block.mlp.fc2.weight, block.mlp.fc2.bias).permute(0, 3, 1, 2)
    return F.conv2d(x, decoder.pred.weight, decoder.pred.bias).flatten(2).transpose(1, 2)


def plain_loss(method: FCMAE, images: Tensor, masks) -> Tensor:
    last = masked_stages(twin(method.encoder), images, masks, method.grid)[-1]
    if method.cfg.norm_pix_loss:
        target = normalised_patches(images, 32)
    else:
        batch, channels, height, width = images.shape
        cells = images.reshape(batch, channels, height // 32, 32, width // 32, 32)
        target = torch.einsum("bchpwq->bhwpqc", cells).reshape(batch, -1, 32 * 32 * channels)
    per_patch = ((plain_decoder(method, last, masks) - target) ** 2).mean(-1)
    return (per_patch * masks.mask).sum() / masks.mask.sum()


@pytest.mark.parametrize(
    "encoder, settings",
    [
        (small_convnextv2, {}),
        (lambda: small_named("convnextv2_tiny", in_chans=1), {"norm_pix_loss": False, "decoder_depth": 2}),
        (lambda: small_named("convnext_tiny"), {"mask_ratio": 0.4}),
        (small_resnet, {}),
    ],
    ids=["v2-atto", "v2-tiny-grey", "v1", "resnet"],
)
def test_loss_and_gradients_equal_the_dense_masked_way_in_fp64(encoder, settings):
    method = wake(fcmae(encoder(), **settings).double().train())
    images, masks = torch.randn(2, method.encoder.in_chans, *SIZE, dtype=torch.float64), draw(method)
    plain = plain_loss(method, images, masks)
    assert_same_loss_and_gradients(method, method.predict_removed(images, masks).loss, plain)


def test_batch_statistics_join_the_images_and_image_statistics_do_not():
    images = torch.randn(3, 3, *SIZE, dtype=torch.float64)
    for stats, same in (("image", True), ("batch", False)):
        method = wake(fcmae(small_convnextv2(), grn_stats=stats).double())
        masks = draw(method, 3)
        tiles = TileIndex.from_ids_keep(masks.ids_keep, method.grid)
        alone = TileIndex.from_ids_keep(masks.ids_keep[:1], method.grid)
        run = method._on_tiles[0]
        together = run(images, tiles)[-1][:1]
        assert torch.allclose(together, run(images[:1], alone)[-1], rtol=1e-10, atol=1e-12) is same, stats


def test_nineteen_of_49_cells_are_kept():
    with torch.device("meta"):
        method = create_method("fcmae", create_encoder("convnextv2_atto"), None, 224)
    assert (method.num_cells, method.num_keep, method.cell) == (49, 19, 32)
    assert draw(method).mask.sum(1).tolist() == [30, 30]
    assert method.decoder.pred.out_channels == 3 * 32 * 32
    assert (method.decoder.proj.out_channels, len(method.decoder.blocks)) == (512, 1)


def test_loss_reads_neither_removed_input_pixels_nor_visible_targets():
    method = wake(fcmae(small_convnextv2()))
    images, masks = torch.randn(2, 3, *SIZE), draw(method)
    removed, other = removed_of(masks, method.grid, SIZE), torch.randn(2, 3, *SIZE)
    expected = method.predict_removed(images, masks).loss
    assert method.predict_removed(other.where(removed, images), masks, target=images).loss == expected
    assert method.predict_removed(images, masks, target=other.where(~removed, images)).loss == expected
    assert method.predict_removed(images, masks, target=other.where(removed, images)).loss != expected
    assert method.predict_removed(other.where(~removed, images), masks, target=images).loss != expected


def test_a_visible_feature_of_exactly_zero_stays_visible():
    """The authors' sparse tensors are made by a test for zero, so such positions vanish there."""
    method = wake(fcmae(small_convnextv2()))
    masks = draw(method)
    images = torch.zeros(2, 3, *SIZE)
    with torch.no_grad():
        method.encoder.stem[0].bias.zero_()
        method.encoder.stem[1].bias.zero_()
    features = method._on_tiles[0](images, TileIndex.from_ids_keep(masks.ids_keep, method.grid))[0]
    assert features.shape == (2, method.num_keep, 8, 8, 8)
    assert (features != 0).any(-1).all()


def test_the_exported_encoder_has_timms_keys(timm):
    method = fcmae(create_encoder("convnextv2_atto"))
    method(Batch(torch.randn(2, 3, *SIZE), torch.tensor([0, 0, 0]))).loss.backward()
    model = timm.create_model(method.encoder.name, **method.encoder.timm_kwargs)
    model.load_state_dict(method.encoder.state_dict(), strict=True)


def minkowski_kernel(weight: Tensor) -> Tensor:
    """[C, 1, k, k] -> [k*k, C]; [out, in, k, k] -> [k*k, in, out]; position q * k + r for row r and column q."""
    side = weight.shape[-1]
    rows = [weight[:, :, r, q] for q in range(side) for r in range(side)]  # each [out, in]
    if weight.shape[1] == 1:
        return torch.stack([row[:, 0] for row in rows])
    return torch.stack([row.T for row in rows])


def official_block(weights: dict[str, Tensor], ours: str, prefix: str, *, sparse: bool) -> dict[str, Tensor]:
    w = {key.removeprefix(ours): value for key, value in weights.items() if key.startswith(ours)}
    ln, linear = (".ln", ".linear") if sparse else ("", "")
    named = {
        f"norm{ln}.weight": w["norm.weight"],
        f"norm{ln}.bias": w["norm.bias"],
        "dwconv.bias": w["conv_dw.bias"].view(1, -1) if sparse else w["conv_dw.bias"],
        "grn.gamma": w["mlp.grn.weight"].view(1, -1) if sparse else w["mlp.grn.weight"].view(1, 1, 1, -1),
        "grn.beta": w["mlp.grn.bias"].view(1, -1) if sparse else w["mlp.grn.bias"].view(1, 1, 1, -1),
    }
    for theirs, name in (("pwconv1", "fc1"), ("pwconv2", "fc2")):
        named[f"{theirs}{linear}.weight"] = w[f"mlp.{name}.weight"].flatten(1)
        named[f"{theirs}{linear}.bias"] = w[f"mlp.{name}.bias"]
    if sparse:
        named["dwconv.kernel"] = minkowski_kernel(w["conv_dw.weight"])
    else:
        named["dwconv.weight"] = w["conv_dw.weight"]
    return {prefix + key: value for key, value in named.items()}


def official_state_dict(method: FCMAE, *, sparse: bool) -> dict[str, Tensor]:
    """Our weights under the official names: a training checkpoint (sparse) or a release (dense encoder alone)."""
    weights = dict(method.state_dict())
    start = "encoder." if sparse else ""
    official = {
        f"{start}downsample_layers.0.{part}": weights[f"encoder.stem.{part}"]
        for part in ("0.weight", "0.bias", "1.weight", "1.bias")
    }
    for stage in range(4):
        for block in range(len(method.encoder.stages[stage].blocks)):
            ours = f"encoder.stages.{stage}.blocks.{block}."
            official |= official_block(weights, ours, f"{start}stages.{stage}.{block}.", sparse=sparse)
        if stage:
            ours, theirs = f"encoder.stages.{stage}.downsample.", f"{start}downsample_layers.{stage}."
            ln = "ln." if sparse else ""
            official[f"{theirs}0.{ln}weight"], official[f"{theirs}0.{ln}bias"] = (
                weights[ours + "0.weight"],
                weights[ours + "0.bias"],
            )
            convolution, bias = weights[ours + "1.weight"], weights[ours + "1.bias"]
            if sparse:
                official[f"{theirs}1.kernel"], official[f"{theirs}1.bias"] = minkowski_kernel(convolution), bias[None]
            else:
                official[f"{theirs}1.weight"], official[f"{theirs}1.bias"] = convolution, bias
    if sparse:
        official |= official_block(weights, "decoder.blocks.0.", "decoder.0.", sparse=False)
        for key in ("proj.weight", "proj.bias", "pred.weight", "pred.bias", "mask_token"):
            official[key] = weights[f"decoder.{key}"]
    return {key: value.clone() for key, value in official.items()}


@pytest.mark.parametrize("name", ["convnextv2_atto", "convnextv2_tiny"])  # timm stores the MLP in two ways
@pytest.mark.parametrize("sparse", [True, False], ids=["training checkpoint", "release"])
def test_official_weights_are_loaded(name, sparse):
    source, target = wake(fcmae(small_named(name))), fcmae(small_named(name))
    before = {key: value.clone() for key, value in target.state_dict().items()}
    target.load_official(official_state_dict(source, sparse=sparse))
    expected = source.state_dict()
    for key, value in target.state_dict().items():
        kept = key.startswith("encoder.head.") or (key.startswith("decoder.") and not sparse)
        assert torch.equal(value, before[key] if kept else expected[key]), key


def test_official_names_are_mapped_one_by_one():
    names = {
        "downsample_layers.0.1.weight": "encoder.stem.1.weight",
        "encoder.downsample_layers.2.0.ln.bias": "encoder.stages.2.downsample.0.bias",
        "encoder.stages.3.1.pwconv2.linear.weight": "encoder.stages.3.blocks.1.mlp.fc2.weight",
        "stages.2.10.norm.weight": "encoder.stages.2.blocks.10.norm.weight",
        "decoder.0.norm.weight": "decoder.blocks.0.norm.weight",
        "norm.weight": "encoder.head.norm.weight",
        "head.bias": "encoder.head.fc.bias",
    }
    assert list(official_weights({key: torch.zeros(3) for key in names})) == list(names.values())


def test_official_weights_that_do_not_fit_are_refused():
    source = fcmae(small_convnextv2())
    broken = official_state_dict(source, sparse=True)
    broken.pop("encoder.stages.1.0.dwconv.bias")
    broken["encoder.stages.9.0.dwconv.bias"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"stages\.1\.blocks\.0\.conv_dw\.bias"):
        source.load_official(broken)


@pytest.mark.parametrize(
    "encoder, img_size, settings, sentence",
    [
        (lambda: small_vit(64, 8), (64, 64), {}, "fcmae: computes the visible tiles of a CNN"),
        (small_convnextv2, (64, 80), {}, "width 80 is not divisible by the encoder's stride 32"),
        (small_convnextv2, (32, 32), {}, "single cell"),
        (small_convnextv2, (64, 64), {"mask_ratio": 0.9}, "removes all"),
    ],
)
def test_impossible_settings_are_refused(encoder, img_size, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        fcmae(encoder(), img_size, **settings)
