"""Whole networks on tiles against the same networks computed densely with every layer masked: outputs of all stages,
gradients of images and parameters, running statistics."""

import copy
import functools

import pytest
import torch

from fastmim.layers import sparsify, stage_names
from fastmim.models import create_encoder
from fastmim.models.convnext import ConvNeXt
from fastmim.models.resnet import BasicBlock, Bottleneck, ResNet
from fastmim.ops import gather_tiles
from tests.layers.dense_masked import mask_every_layer, visible

TOLERANCE = {torch.float64: (1e-9, 1e-10), torch.float32: (2e-3, 2e-4)}  # rtol, atol relative to the largest value

OURS = {
    "resnet_basic": lambda: ResNet(BasicBlock, (2, 1, 1, 1), num_classes=5),
    "resnet_bottleneck": lambda: ResNet(Bottleneck, (1, 1, 1, 1)),
    "convnext": lambda: ConvNeXt((1, 1, 2, 1), (5, 9, 13, 17), ls_init_value=0.5, num_classes=3),
    "convnextv2": lambda: ConvNeXt((1, 2, 1, 1), (8, 16, 24, 32), use_grn=True, ls_init_value=None, conv_mlp=True),
}


def timms(timm, kind):
    """Small networks of timm's classes."""
    from timm.models import convnext, resnet

    narrow = {"channels": (8, 12, 16, 20), "num_classes": 0}
    if kind == "resnet_bottleneck":
        return resnet.ResNet(resnet.Bottleneck, (1, 1, 1, 1), **narrow)
    if kind == "resnet_d":  # deep stem, average pooling in the shortcut
        return resnet.ResNet(resnet.BasicBlock, (2, 1, 1, 1), stem_width=8, stem_type="deep", avg_down=True, **narrow)
    if kind == "resnet_se":
        return resnet.ResNet(resnet.Bottleneck, (1, 1, 1, 1), block_args={"attn_layer": "se"}, **narrow)
    if kind == "resnet_gn":
        norm = functools.partial(timm.layers.GroupNorm, num_groups=4)
        return resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), norm_layer=norm, **narrow)
    shape = {"depths": (1, 1, 2, 1), "dims": (6, 10, 14, 18), "num_classes": 4}
    if kind == "convnext":
        return convnext.ConvNeXt(**shape, ls_init_value=0.5)
    if kind == "convnext_conv_mlp":
        return convnext.ConvNeXt(**shape, ls_init_value=0.5, conv_mlp=True)
    return convnext.ConvNeXt(**shape, ls_init_value=None, use_grn=True, conv_mlp=kind == "convnextv2_conv_mlp")


def awake(module, dtype):
    """Every parameter and statistic away from its start, where half of a network does nothing."""
    generator = torch.Generator().manual_seed(1)
    for name, value in module.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.is_floating_point() and value.ndim == 1:
            value.normal_(0.7, 0.3, generator=generator)
        elif value.is_floating_point() and min(value.shape[:2]) > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
    return module.to(dtype)


def close(actual, expected, dtype, what):
    rtol, atol = TOLERANCE[dtype]
    scale = max(expected.abs().max().item(), 1e-6)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol * scale, msg=lambda text: f"{what}: {text}")


def outputs_and_gradients(run, module, images):
    """Every stage's visible features, then gradients of their weighted sum."""
    images = images.clone().requires_grad_()
    features = run(images)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(f.shape, generator=generator, dtype=torch.float64).to(f.dtype) for f in features]
    loss = sum((f * w).sum() / f.numel() ** 0.5 for f, w in zip(features, weights, strict=True))
    named = [(name, p) for name, p in module.named_parameters() if not name.startswith(("fc.", "head.", "classifier."))]
    gradients = torch.autograd.grad(loss, [images, *(p for _, p in named)])
    return features, dict(zip(["images", *(name for name, _ in named)], gradients, strict=True))


def check_equals_masked(module, tiles, cell, dtype, training=True):
    gh, gw = tiles.grid
    module = awake(module, dtype).train(training)
    twin = copy.deepcopy(module)
    stages = stage_names(module)
    sparse = sparsify(module, outputs=stages)
    images = torch.randn(tiles.batch, 3, gh * cell, gw * cell, generator=torch.Generator().manual_seed(3)).to(dtype)
    mask_every_layer(twin, tiles)

    def masked(images):
        found = {}
        hooks = [
            twin.get_submodule(name).register_forward_hook(lambda m, i, out, name=name: found.update({name: out}))
            for name in stages
        ]
        twin(images * visible(tiles, (gh * cell, gw * cell), dtype).unsqueeze(1))
        for hook in hooks:
            hook.remove()
        return [gather_tiles(found[name], tiles) for name in stages]

    mine, my_gradients = outputs_and_gradients(lambda x: sparse(x, tiles), module, images)
    theirs, their_gradients = outputs_and_gradients(masked, twin, images)
    for name, a, b in zip(stages, mine, theirs, strict=True):
        close(a, b, dtype, name)
    assert my_gradients.keys() == their_gradients.keys()
    for name in my_gradients:
        close(my_gradients[name], their_gradients[name], dtype, f"gradient of {name}")
    for (name, a), (_, b) in zip(module.named_buffers(), twin.named_buffers(), strict=True):
        close(a.to(dtype), b.to(dtype), dtype, name)
    assert [(o.channels, o.stride) for o in sparse.outputs] == [(f.shape[-1], cell // f.shape[2]) for f in mine]
    with torch.no_grad():  # the whole forward, head included
        module.eval(), twin.eval()
        masked_images = images * visible(tiles, (gh * cell, gw * cell), dtype).unsqueeze(1)
        close(sparsify(module)(images, tiles), twin(masked_images), dtype, "the forward's result")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OURS)
def test_our_encoders(name, dtype, some_tiles):
    check_equals_masked(OURS[name](), some_tiles(2, (2, 3), 3), 32, dtype)


@pytest.mark.parametrize("grid, count, training", [((3, 5), 1, False), ((1, 4), 2, True), ((3, 2), 6, True)])
@pytest.mark.parametrize("name", ["resnet_basic", "convnextv2"])
def test_rectangles_single_cells_and_whole_images(name, grid, count, training, some_tiles):
    check_equals_masked(OURS[name](), some_tiles(2, grid, count), 32, torch.float64, training)


def test_cells_larger_than_the_stride(some_tiles):
    check_equals_masked(OURS["convnext"](), some_tiles(2, (2, 2), 2), 64, torch.float64)


@pytest.mark.timm
@pytest.mark.parametrize(
    "kind",
    [
        "resnet_bottleneck",
        "resnet_d",
        "resnet_se",
        "resnet_gn",
        "convnext",
        "convnext_conv_mlp",
        "convnextv2",
        "convnextv2_conv_mlp",
    ],
)
def test_timms_encoders(timm, kind, some_tiles):
    check_equals_masked(timms(timm, kind), some_tiles(2, (2, 3), 3), 32, torch.float64)


@pytest.mark.timm
@pytest.mark.parametrize("family", ["resnet", "convnext"])
def test_torchvisions_encoders(timm, family, some_tiles):
    from torchvision.models import convnext, resnet

    if family == "resnet":
        module = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=3)
    else:
        settings = [convnext.CNBlockConfig(*c, 1) for c in ((6, 10), (10, 14), (14, 18), (18, None))]
        module = convnext.ConvNeXt(settings, stochastic_depth_prob=0.0, layer_scale=0.5, num_classes=3)
    check_equals_masked(module, some_tiles(2, (2, 3), 3), 32, torch.float64)


@pytest.mark.parametrize("name", ["resnet50", "convnextv2_atto"])
def test_whole_encoders(name, some_tiles):
    check_equals_masked(create_encoder(name), some_tiles(2, (2, 3), 3), 32, torch.float64)
