"""Each masked layer: its dense meaning, torch's or timm's keys, refusals that say why."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmim.layers import (
    MaskedAdaptiveAvgPool2d,
    MaskedAvgPool2d,
    MaskedBatchNorm2d,
    MaskedConv2d,
    MaskedGRN,
    MaskedGroupNorm,
    MaskedLayerNorm2d,
    MaskedMaxPool2d,
    MaskedSqueezeExcite,
)
from fastmim.models.norms import GlobalResponseNorm
from fastmim.ops import gather_tiles, masked_conv2d, scatter_tiles
from fastmim.ops.masked_conv import multiplies_rows_faster


def random_tiles(tiles, side, channels, dtype=torch.float64):
    shape = (tiles.batch, tiles.count, side, side, channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


CONVOLUTIONS = [
    ({"in_channels": 5, "out_channels": 7, "kernel_size": 1}, 2),
    ({"in_channels": 5, "out_channels": 7, "kernel_size": 1, "stride": 2, "bias": False}, 4),
    ({"in_channels": 3, "out_channels": 6, "kernel_size": 4, "stride": 4}, 8),
    ({"in_channels": 7, "out_channels": 5, "kernel_size": 2, "stride": 2}, 2),
    ({"in_channels": 5, "out_channels": 3, "kernel_size": 3, "padding": 1}, 1),
    ({"in_channels": 5, "out_channels": 5, "kernel_size": 3, "padding": "same", "bias": False}, 2),
    ({"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2, "padding": 1}, 2),
    ({"in_channels": 3, "out_channels": 8, "kernel_size": 7, "stride": 2, "padding": 3}, 4),
    ({"in_channels": 9, "out_channels": 9, "kernel_size": 7, "padding": 3, "groups": 9}, 2),
    ({"in_channels": 9, "out_channels": 9, "kernel_size": (5, 5), "stride": (1, 1), "padding": (2, 2), "groups": 9}, 1),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options, side", CONVOLUTIONS)
def test_convolution_equals_the_dense_one_on_zeroed_input(options, side, dtype, some_tiles):
    tiles = some_tiles(2, (3, 4), 5)
    layer, dense = MaskedConv2d(**options).to(dtype), nn.Conv2d(**options).to(dtype)
    dense.load_state_dict(layer.state_dict())
    x = random_tiles(tiles, side, options["in_channels"], dtype).requires_grad_()
    mine, theirs = layer(x, tiles), gather_tiles(dense(scatter_tiles(x, tiles)), tiles)
    torch.testing.assert_close(mine, theirs)
    cotangent = torch.randn_like(mine)
    my_gradients = torch.autograd.grad(mine, [x, *layer.parameters()], cotangent)
    their_gradients = torch.autograd.grad(theirs, [x, *dense.parameters()], cotangent)
    for a, b in zip(my_gradients, their_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stride", [1, 2])
def test_only_fp32_on_a_cpu_multiplies_rows_by_its_own_product(stride, some_tiles, monkeypatch):
    monkeypatch.delenv("FASTMIM_BACKEND", raising=False)
    taken = []

    def recorded(x, *args, **kwargs):
        taken.append(x.dtype)
        return masked_conv2d(x, *args, **kwargs)

    monkeypatch.setattr("fastmim.layers.masked_conv.masked_conv2d", recorded)
    tiles, layer = some_tiles(2, (2, 3), 4), MaskedConv2d(20, 24, 1, stride=stride)
    x = random_tiles(tiles, 2, 20, torch.float32)
    results = {x.dtype: layer(x, tiles)}
    with torch.autocast("cpu", torch.bfloat16):
        results[torch.bfloat16] = layer(x, tiles)
    results[torch.float64] = layer.double()(x.double(), tiles)
    assert taken == ([torch.float32] if multiplies_rows_faster(x) else [])
    for dtype, out in results.items():
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(out.double(), results[torch.float64], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"kernel_size": 3}, "does not map tiles to tiles"),
        ({"kernel_size": 3, "stride": 2}, "does not map tiles to tiles"),
        ({"kernel_size": 7, "stride": 4, "padding": 3}, "does not map tiles to tiles"),
        ({"kernel_size": 4, "padding": "same"}, "does not map tiles to tiles"),
        ({"kernel_size": 3, "padding": 2, "dilation": 2}, "dilation is"),
        ({"kernel_size": 3, "padding": 1, "groups": 2}, "groups is 2"),
        ({"kernel_size": (3, 1), "padding": (1, 0)}, "same in both directions"),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, "padding_mode is 'reflect'"),
    ],
)
def test_convolutions_that_are_refused(options, reason):
    with pytest.raises(ValueError, match=f"MaskedConv2d: .*{reason}"):
        MaskedConv2d(8, 8, **options)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("side", [4, 1])
def test_batch_norm_equals_batch_norm_of_visible_rows(side, tracked, momentum, some_tiles):
    tiles = some_tiles(3, (2, 3), 2)
    options = {"momentum": momentum, "track_running_stats": tracked}
    layer, rows = MaskedBatchNorm2d(5, **options).double(), nn.BatchNorm1d(5, **options).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    rows.load_state_dict(layer.state_dict())
    for step in range(3):
        layer.train(step < 2), rows.train(step < 2)
        x = (random_tiles(tiles, side, 5) * (step + 1) + 3).requires_grad_()
        mine, theirs = layer(x, tiles), rows(x.reshape(-1, 5)).reshape(x.shape)
        torch.testing.assert_close(mine, theirs)
        cotangent = torch.randn_like(mine)
        my_gradients = torch.autograd.grad(mine, [x, layer.weight, layer.bias], cotangent)
        their_gradients = torch.autograd.grad(theirs, [x, rows.weight, rows.bias], cotangent)
        torch.testing.assert_close(my_gradients, their_gradients)
        torch.testing.assert_close(dict(layer.named_buffers()), dict(rows.named_buffers()))


def test_group_norm_takes_statistics_of_each_image(some_tiles):
    tiles = some_tiles(2, (2, 3), 2)
    layer = MaskedGroupNorm(3, 6).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    x = random_tiles(tiles, 4, 6)
    rows = x.reshape(2, -1, 6).transpose(1, 2)  # [B, C, positions]
    expected = F.group_norm(rows, 3, layer.weight, layer.bias).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x, tiles), expected)
    assert list(layer.state_dict()) == list(nn.GroupNorm(3, 6).state_dict())


def test_layer_norm_is_that_of_the_map(some_tiles):
    tiles = some_tiles(2, (2, 3), 2)
    layer = MaskedLayerNorm2d(5).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    x = random_tiles(tiles, 2, 5)
    dense = F.layer_norm(scatter_tiles(x, tiles).permute(0, 2, 3, 1), (5,), layer.weight, layer.bias, 1e-6)
    torch.testing.assert_close(layer(x, tiles), gather_tiles(dense.permute(0, 3, 1, 2), tiles))


def test_response_norm_equals_the_dense_one_where_masked_positions_are_zero(some_tiles):
    tiles = some_tiles(2, (2, 3), 2)
    layer, dense = MaskedGRN(5).double(), GlobalResponseNorm(5).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    dense.load_state_dict(layer.state_dict())
    x = random_tiles(tiles, 4, 5)
    of_map = dense(scatter_tiles(x, tiles).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x, tiles), gather_tiles(of_map, tiles))


def test_response_norm_of_the_batch_is_that_of_one_image_with_all_positions(some_tiles):
    tiles = some_tiles(3, (2, 3), 2)
    layer, dense = MaskedGRN(5, grn_stats="batch").double(), GlobalResponseNorm(5).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    dense.load_state_dict(layer.state_dict())
    x = random_tiles(tiles, 4, 5)
    torch.testing.assert_close(layer(x, tiles), dense(x.reshape(1, -1, 1, 5)).reshape(x.shape))
    with pytest.raises(ValueError, match="image, batch"):
        MaskedGRN(5, grn_stats="both")


def test_squeeze_excite_squeezes_visible_positions(some_tiles):
    tiles = some_tiles(2, (2, 3), 2)
    layer = MaskedSqueezeExcite(16, rd_ratio=0.5).double()
    x = random_tiles(tiles, 4, 16)
    mean = x.reshape(2, -1, 16).mean(1)[:, :, None, None]  # [B, C, 1, 1]
    gate = torch.sigmoid(layer.fc2(torch.relu(layer.fc1(mean)))).flatten(1)
    torch.testing.assert_close(layer(x, tiles), x * gate[:, None, None, None])


@pytest.mark.timm
def test_keys_and_shapes_are_timms(timm):
    from timm.layers import LayerNorm2d, SqueezeExcite
    from timm.layers.grn import GlobalResponseNorm

    for ours, theirs in [
        (MaskedSqueezeExcite(64), SqueezeExcite(64)),
        (MaskedSqueezeExcite(100, rd_ratio=0.3), SqueezeExcite(100, rd_ratio=0.3)),
        (MaskedSqueezeExcite(24, rd_channels=5, bias=False), SqueezeExcite(24, rd_channels=5, bias=False)),
        (MaskedGRN(6), GlobalResponseNorm(6)),
        (MaskedLayerNorm2d(6), LayerNorm2d(6)),
        (MaskedLayerNorm2d(6, affine=False), LayerNorm2d(6, affine=False)),
    ]:
        shapes = [{key: value.shape for key, value in layer.state_dict().items()} for layer in (ours, theirs)]
        assert shapes[0] == shapes[1]


def test_max_pool_never_takes_a_masked_position(some_tiles):
    tiles = some_tiles(2, (2, 3), 3)
    x = random_tiles(tiles, 4, 5) - 10  # zeros in masked places would win
    dense = F.max_pool2d(scatter_tiles(x, tiles, torch.full((5,), -torch.inf).double()), 3, 2, 1)
    torch.testing.assert_close(MaskedMaxPool2d(3, 2, 1)(x, tiles), gather_tiles(dense, tiles))


def test_average_pool_is_the_true_mean_or_sparks(some_tiles):
    tiles = some_tiles(2, (2, 3), 3)
    x = torch.ones(2, 3, 4, 4, 5)
    assert MaskedAvgPool2d(3, 1, 1)(x, tiles).eq(1).all()
    biased = MaskedAvgPool2d(3, 1, 1, count="window")(x, tiles)
    torch.testing.assert_close(biased, gather_tiles(F.avg_pool2d(scatter_tiles(x, tiles), 3, 1, 1), tiles))
    pooled = MaskedAdaptiveAvgPool2d(1)(random_tiles(tiles, 4, 5), tiles)
    assert pooled.shape == (2, 1, 1, 1, 5)
    torch.testing.assert_close(pooled.flatten(1), random_tiles(tiles, 4, 5).reshape(2, -1, 5).mean(1))


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: MaskedMaxPool2d(3, 2), "do not map tiles to tiles"),
        (lambda: MaskedMaxPool2d(3, 2, 1, ceil_mode=True), "rounded up"),
        (lambda: MaskedMaxPool2d(3, 1, 2, dilation=2), "dilation"),
        (lambda: MaskedMaxPool2d((2, 4)), "same in both directions"),
        (lambda: MaskedAvgPool2d(2, 1), "do not map tiles to tiles"),
        (lambda: MaskedAvgPool2d(2, count="all"), "visible, window"),
        (lambda: MaskedAdaptiveAvgPool2d(7), "only 1 is supported"),
    ],
)
def test_pools_that_are_refused(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


def test_no_images_give_no_features(some_tiles):
    tiles = some_tiles(1, (2, 3), 3)
    none = type(tiles)(*(t[:0] for t in (tiles.ids_keep, tiles.slots, tiles.neighbours)), tiles.grid)
    x = torch.zeros(0, 3, 4, 4, 8)
    layers = [
        (MaskedConv2d(8, 8, 3, padding=1), 4),
        (MaskedConv2d(8, 8, 2, stride=2), 2),
        (MaskedMaxPool2d(3, 2, 1), 2),
        (MaskedAvgPool2d(2), 2),
        (MaskedBatchNorm2d(8), 4),
        (MaskedGroupNorm(2, 8), 4),
        (MaskedLayerNorm2d(8), 4),
        (MaskedGRN(8), 4),
        (MaskedSqueezeExcite(8), 4),
    ]
    for layer, side in layers:
        assert layer(x, none).shape == (0, 3, side, side, 8), layer
        assert all(value.isfinite().all() for value in layer.state_dict().values()), layer


def test_response_norm_of_silent_channels_has_finite_gradients(some_tiles):
    tiles = some_tiles(2, (2, 3), 2)
    layer = MaskedGRN(4)
    x = torch.zeros(2, 2, 4, 4, 4, requires_grad=True)
    layer(x, tiles).sum().backward()
    assert x.grad.eq(1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_response_norm_in_half_precision_keeps_small_changes(dtype, some_tiles):
    tiles = some_tiles(2, (2, 3), 2)
    x = (random_tiles(tiles, 4, 6) * 100).to(dtype)
    layer = MaskedGRN(6)
    nn.init.normal_(layer.weight, std=0.1), nn.init.normal_(layer.bias)
    mine, expected = layer(x, tiles), layer.double()(x.double(), tiles)
    assert mine.dtype == dtype
    assert (mine.double() - expected).norm() <= 1.01 * (expected.to(dtype).double() - expected).norm()
