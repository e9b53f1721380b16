"""sparsify: plain networks at K = N, masked pixels without influence, sharing, and refusals by name."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmim.layers
from fastmim.layers import TileOutput, sparsify, stage_names
from fastmim.models import create_encoder
from fastmim.ops import TileIndex, gather_tiles
from tests.layers.test_sparsify_equals_masked import awake

DOCS = Path(__file__).parents[2] / "docs" / "layers.md"


def images_for(tiles, cell=32, dtype=torch.float32):
    gh, gw = tiles.grid
    return torch.randn(tiles.batch, 3, gh * cell, gw * cell, generator=torch.Generator().manual_seed(3)).to(dtype)


class Net(nn.Module):
    """What people write: functions, operators, a parameter and a buffer of their own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(16)
        self.gamma = nn.Parameter(torch.rand(8))
        self.register_buffer("offset", torch.rand(1, 16, 1, 1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x, scale=2.0):
        x = F.gelu(self.stem(x)) * self.gamma[:, None, None]
        for block in self.blocks:
            x = x + scale * torch.relu(block(x))
        x = F.max_pool2d(torch.cat([x, -x], dim=1), 2)
        x = F.dropout(self.norm(x), 0.5, self.training) - self.offset
        x = F.conv2d(x, self.blocks[0].weight.repeat(1, 2, 1, 1), padding=1)
        x = torch.cat((x, x / (1 + x.abs().mean(1, keepdim=True))), 1)
        x = F.layer_norm(x.permute(0, 2, 3, 1), (16,)).permute(0, 3, 1, 2).contiguous()
        pooled = F.adaptive_avg_pool2d(x, 1)
        return {"map": x, "logits": self.fc(pooled.view(pooled.size(0), -1)), "mean": x.mean([2, 3])}


@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto"])
@pytest.mark.parametrize("training", [True, False])
def test_with_every_cell_visible_it_is_the_plain_encoder(name, training, some_tiles):
    tiles = some_tiles(2, (2, 3), 6)
    encoder = awake(create_encoder(name, num_classes=7), torch.float64).train(training)
    images = images_for(tiles, dtype=torch.float64)
    sparse = sparsify(copy.deepcopy(encoder))
    torch.testing.assert_close(sparse(images, tiles), encoder(images))
    torch.testing.assert_close(sparse.state_dict(), encoder.state_dict())  # running statistics too


@pytest.mark.timm
@pytest.mark.parametrize("name", ["resnet18", "resnet26t", "convnext_atto", "convnextv2_atto"])
def test_with_every_cell_visible_it_is_timms_encoder(timm, name, some_tiles):
    tiles = some_tiles(2, (2, 3), 6)
    encoder = timm.create_model(name, num_classes=7, drop_rate=0.1).double().eval()
    images = images_for(tiles, dtype=torch.float64)
    torch.testing.assert_close(sparsify(encoder)(images, tiles), encoder(images))


def test_a_network_of_ones_own(some_tiles):
    tiles = some_tiles(2, (3, 2), 6)
    net = Net().double().eval()
    images = images_for(tiles, cell=8, dtype=torch.float64)
    dense, mine = net(images), sparsify(net)(images, tiles)
    torch.testing.assert_close(mine["map"], gather_tiles(dense["map"], tiles))
    torch.testing.assert_close((mine["logits"], mine["mean"]), (dense["logits"], dense["mean"]))


def test_changes_in_place_happen_though_nobody_takes_their_result(some_tiles):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 2, stride=2)
            self.act = nn.ReLU(inplace=True)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            x = self.conv(x)
            x.add_(0.5)
            self.act(x)
            F.hardtanh(x, 0.1, 0.3, inplace=True)
            return x

    tiles, net = some_tiles(2, (2, 3), 6), InPlace()
    images = images_for(tiles, cell=4)
    torch.testing.assert_close(sparsify(net)(images, tiles), gather_tiles(net(images), tiles))
    assert net.calls == 2


@pytest.mark.parametrize("name", ["resnet50", "convnextv2_atto"])
def test_masked_pixels_change_nothing(name, some_tiles):
    tiles = some_tiles(2, (2, 3), 2)
    encoder = awake(create_encoder(name), torch.float32)
    sparse = sparsify(encoder, outputs=stage_names(encoder))
    images = images_for(tiles)
    other = torch.where(
        (tiles.slots < 0).reshape(2, 1, 2, 3).repeat_interleave(32, 2).repeat_interleave(32, 3), 9e9, images
    )
    assert not torch.equal(images, other)
    for a, b in zip(sparse(images, tiles), sparse(other, tiles), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto"])
def test_the_order_of_cells_is_the_order_of_tiles(name, some_tiles):
    tiles = some_tiles(2, (2, 3), 4)
    encoder = awake(create_encoder(name), torch.float64)
    sparse = sparsify(encoder, outputs=stage_names(encoder))
    images, order = images_for(tiles, dtype=torch.float64), torch.tensor([2, 0, 3, 1])
    permuted = type(tiles).from_ids_keep(tiles.ids_keep[:, order], tiles.grid)
    for a, b in zip(sparse(images, tiles), sparse(images, permuted), strict=True):
        torch.testing.assert_close(a[:, order], b)


@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto"])
def test_no_images_give_no_features(name):
    tiles = TileIndex.from_ids_keep(torch.zeros(0, 3, dtype=torch.int64), (2, 3))
    encoder = create_encoder(name)
    last = sparsify(encoder, outputs=stage_names(encoder)[-1])(torch.zeros(0, 3, 64, 96), tiles)
    assert last.shape == (0, 3, 1, 1, encoder.num_features)
    assert all(value.isfinite().all() for value in encoder.state_dict().values())


@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto"])
def test_autocast_stays_near_fp32(name, some_tiles):
    tiles = some_tiles(2, (2, 3), 3)
    encoder = create_encoder(name)
    sparse = sparsify(encoder, outputs=stage_names(encoder)[-1])
    with torch.autocast("cpu", torch.bfloat16):
        half = sparse(images_for(tiles), tiles)
    half.float().square().mean().backward()
    full = sparse(images_for(tiles), tiles)
    assert (half - full).norm() < 0.03 * full.norm()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


def test_named_outputs_tell_what_they_are_and_end_the_computation(some_tiles):
    tiles = some_tiles(1, (1, 2), 2)
    encoder = create_encoder("resnet18")
    encoder.layer4 = nn.Sequential(nn.InstanceNorm2d(256), encoder.layer4)  # never reached
    sparse = sparsify(encoder, outputs=["layer1", "layer3", "layer2.0.conv1"])
    wanted = (("layer1", 64, 4), ("layer3", 256, 16), ("layer2.0.conv1", 128, 8))
    assert sparse.outputs == tuple(TileOutput(*output) for output in wanted)
    assert [tuple(out.shape[2:]) for out in sparse(images_for(tiles), tiles)] == [(8, 8, 64), (2, 2, 256), (4, 4, 128)]
    assert sparsify(encoder, outputs="layer3")(images_for(tiles), tiles).shape == (1, 2, 2, 2, 256)
    assert "layer4" not in sparse.code


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_it_is_the_same_layers(name, some_tiles):
    encoder = create_encoder(name, drop_path_rate=0.1)
    sparse = sparsify(encoder)
    assert list(sparse.state_dict()) == list(encoder.state_dict())
    assert [id(p) for p in sparse.parameters()] == [id(p) for p in encoder.parameters()]
    assert [id(b) for b in sparse.buffers()] == [id(b) for b in encoder.buffers()]
    sparse.double()
    assert {p.dtype for p in encoder.parameters()} == {torch.float64}
    encoder.load_state_dict(create_encoder(name).state_dict(), assign=True)
    assert all(a is b for a, b in zip(sparse.parameters(), encoder.parameters(), strict=True))
    assert all(a is b for a, b in zip(sparse.buffers(), encoder.buffers(), strict=True))
    for module in (sparse, encoder):
        module.eval()
        assert not any(layer.training for layer in [*encoder.modules(), *sparse.modules()])
        module.train()
        assert all(layer.training for layer in encoder.modules())


def test_the_dense_module_still_is_what_it_was():
    encoder = create_encoder("resnet18").eval()
    images = torch.randn(1, 3, 64, 64)
    before, described = encoder(images), repr(encoder)
    sparsify(encoder)
    assert torch.equal(encoder(images), before)
    assert repr(encoder) == described
    assert not any(layer.training for layer in encoder.modules())


def test_copies_keep_sharing(some_tiles):
    tiles = some_tiles(1, (1, 2), 1)
    owner = nn.Module()
    owner.encoder = create_encoder("resnet18")
    owner.sparse = (sparsify(owner.encoder, outputs="layer2"),)
    assert list(owner.state_dict()) == [f"encoder.{key}" for key in owner.encoder.state_dict()]
    other = copy.deepcopy(owner)
    assert other.sparse[0].conv1 is other.encoder.conv1
    assert other.encoder.conv1 is not owner.encoder.conv1
    torch.testing.assert_close(other.sparse[0](images_for(tiles), tiles), owner.sparse[0](images_for(tiles), tiles))


def test_synchronised_batch_norm_may_come_later(some_tiles):
    tiles = some_tiles(1, (1, 2), 2)
    encoder = create_encoder("resnet18")
    sparse = sparsify(encoder, outputs="layer1")
    expected = copy.deepcopy(sparse)(images_for(tiles), tiles)
    nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
    assert isinstance(sparse.bn1, nn.SyncBatchNorm)
    torch.testing.assert_close(sparse(images_for(tiles), tiles), expected)


def test_training_and_evaluation_each_have_their_forward(some_tiles):
    tiles = some_tiles(2, (2, 2), 4)
    net = Net()
    sparse, images = sparsify(net), images_for(tiles, cell=8)
    assert not torch.equal(sparse(images, tiles)["map"], sparse(images, tiles)["map"])
    net.eval()
    assert torch.equal(sparse(images, tiles)["map"], sparse(images, tiles)["map"])


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18"])
def test_stochastic_depth_drops_whole_images_with_the_draws_of_the_dense_module(name, some_tiles):
    tiles = some_tiles(6, (2, 2), 4)
    encoder = awake(create_encoder(name, drop_path_rate=0.7), torch.float64)
    images = images_for(tiles, dtype=torch.float64)
    torch.manual_seed(0)
    dense = encoder(images)
    torch.manual_seed(0)
    torch.testing.assert_close(sparsify(encoder)(images, tiles), dense)


def test_part_of_a_network_takes_tiles(some_tiles):
    tiles = some_tiles(2, (2, 3), 6)
    stage = create_encoder("resnet18").layer2.double().eval()
    features = torch.randn(2, 64, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(
        sparsify(stage)(gather_tiles(features, tiles), tiles), gather_tiles(stage(features), tiles)
    )


def test_a_single_layer_too(some_tiles):
    tiles = some_tiles(2, (2, 3), 3)
    norm = nn.BatchNorm2d(3)
    images = images_for(tiles, cell=4)
    expected = nn.BatchNorm1d(3)(gather_tiles(images, tiles).reshape(-1, 3))
    torch.testing.assert_close(sparsify(norm)(images, tiles).reshape(-1, 3), expected)
    assert list(sparsify(norm).state_dict()) == list(norm.state_dict())


def test_response_norm_of_the_batch(some_tiles):
    tiles = some_tiles(2, (2, 3), 3)
    encoder = awake(create_encoder("convnextv2_atto"), torch.float64).eval()
    images = images_for(tiles, dtype=torch.float64)
    image, batch = (sparsify(encoder, grn_stats=stats) for stats in ("image", "batch"))
    assert not torch.allclose(image(images, tiles), batch(images, tiles))
    alone = type(tiles).from_ids_keep(tiles.ids_keep[:1], tiles.grid)
    torch.testing.assert_close(image(images[:1], alone), batch(images[:1], alone))


def test_further_layers_can_be_given(some_tiles):
    class Scale(nn.Module):
        def forward(self, x):
            return x * x.amax((0, 1, 2, 3))

    tiles = some_tiles(2, (2, 3), 3)
    net = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), Scale())
    with pytest.raises(ValueError, match=r"1 \(Scale\): amax\(\) of a feature map"):
        sparsify(net)
    sparse = sparsify(net, layers={Scale: lambda layer, x, tiles: x * x.amax()})
    assert sparse(images_for(tiles), tiles).shape == (2, 3, 16, 16, 4)


def test_everything_unsupported_is_listed_in_one_error():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.InstanceNorm2d(8)
            self.conv = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
            self.up = nn.Upsample(scale_factor=2)

        def forward(self, x):
            x = self.conv(self.norm(x))
            return self.up(torch.roll(x, 1, 2))

    net = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), Block(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.LayerNorm(8))
    with pytest.raises(ValueError) as error:
        sparsify(net)
    lines = str(error.value).split("\n  - ")
    assert lines[0] == "sparsify: Sequential cannot run on tiles:"
    named = [line.split(":")[0] for line in lines[1:]]
    assert named == ["1.norm (InstanceNorm2d)", "1.conv (Conv2d)", "1 (Block)", "1.up (Upsample)", "2 (Conv2d)"]
    assert "roll() of a feature map" in lines[3]


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.position = nn.Parameter(torch.ones(1, 4, 4, 4))
        self.function = function

    def forward(self, x):
        return self.function(self, self.conv(x))


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda net, x: x * 2 if x.mean() > 0 else x, "cannot be followed any further: .*control flow"),
        (lambda net, x: x * x.shape[-1], "computes with the height or width"),
        (lambda net, x: x + net.position, r"tensor \[1, 4, 4, 4\] that differs between positions"),
        (lambda net, x: x * torch.ones(4, 1, 1), "register it as a buffer"),
        (lambda net, x: x + x.permute(0, 2, 3, 1), "mixes maps of channels first and channels last"),
        (lambda net, x: x + F.max_pool2d(x, 2), r"mixes maps of strides \[2, 4\]"),
        (lambda net, x: x.permute(0, 1, 3, 2), "tiles can only be seen as"),
        (lambda net, x: x.flatten(1), "only pooled features can be flattened"),
        (lambda net, x: x.mean(2), "only all positions of an image"),
        (lambda net, x: x.sum((0, 2, 3)), "only all positions of an image"),
        (lambda net, x: F.interpolate(x, scale_factor=2), r"interpolate\(\) of a feature map: it has no form on tiles"),
        (lambda net, x: x[:, :, ::2, ::2], r"getitem\(\) of a feature map"),
        (lambda net, x: F.linear(x, net.position[0, 0]), "it acts on the width of a map"),
        (lambda net, x: net.conv(x.mean((2, 3), keepdim=True)), "neighbours of pooled features"),
        (lambda net, x: net.conv(x.permute(0, 2, 3, 1)), "it expects .*B, C, H, W.* and is given"),
    ],
)
def test_functions_without_meaning_on_tiles_say_so(function, reason):
    with pytest.raises(ValueError, match=re.compile(f"sparsify: .*{reason}", re.S)):
        sparsify(Function(function))


def test_hooks_that_would_not_run_are_refused():
    net = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2))
    net[0].register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(ValueError, match="forward hooks, which would not run"):
        sparsify(net)


def test_wrong_names_are_told():
    encoder = create_encoder("resnet18")
    with pytest.raises(ValueError, match="no submodule 'layer9'"):
        sparsify(encoder, outputs=["layer1", "layer9"])
    with pytest.raises(ValueError, match="image, batch"):
        sparsify(encoder, grn_stats="none")
    with pytest.raises(ValueError, match="name the submodules"):
        stage_names(nn.Sequential(nn.Conv2d(3, 4, 1)))
    encoder.aside = nn.Conv2d(3, 3, 1)
    with pytest.raises(ValueError, match="output of aside is wanted, but"):
        sparsify(encoder, outputs=["aside"])


@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto"])
def test_torch_compile_takes_it_whole(name, some_tiles):
    tiles = some_tiles(2, (2, 3), 3)
    encoder = create_encoder(name).eval()
    sparse = sparsify(encoder, outputs=stage_names(encoder))
    compiled = torch.compile(sparse, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images_for(tiles), tiles), sparse(images_for(tiles), tiles))


@pytest.mark.timm
def test_the_example_in_the_documentation_runs(timm):
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(), re.S)[1]
    names = {}
    exec(code, names)
    told = re.search(r"stages = .*# (.*)", code)[1]
    assert [str(list(stage.shape)) for stage in names["stages"]] == re.findall(r"\[[^]]*\]", told)
    assert names["encoder"].conv1.weight.grad.abs().sum() > 0


def test_the_documentation_names_every_layer():
    text = DOCS.read_text()
    assert [name for name in fastmim.layers.__all__ if name.startswith("Masked") and f"`{name}" not in text] == []
