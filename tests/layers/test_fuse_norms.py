"""A norm does what follows it, where nobody else reads what lies between; the results stay."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmim.layers import sparsify
from fastmim.models import create_encoder
from fastmim.ops import gather_tiles
from tests.layers.test_sparsify import images_for
from tests.layers.test_sparsify_equals_masked import awake


class Block(nn.Module):
    """A residual block whose end is a function of its two branches."""

    def __init__(self, end):
        super().__init__()
        self.conv, self.side = nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(3, 4, 2, stride=2)
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.act, self.none = nn.ReLU(inplace=True), nn.Identity()
        self.offset = nn.Parameter(torch.rand(1, 4, 1, 1))
        self.end = end

    def forward(self, x):
        shortcut = self.side(x)
        return self.end(self, self.conv(x), shortcut)


def check(net, tiles, cell=4):
    """Equal results, gradients and running statistics, tiles against dense maps, where every cell is visible."""
    results = []
    for dense in (True, False):
        module = copy.deepcopy(net).double().train()
        images = images_for(tiles, cell, torch.float64)
        torch.manual_seed(1)
        out = gather_tiles(module(images), tiles) if dense else sparsify(module)(images, tiles)
        gradients = ()
        if out.requires_grad:
            gradients = torch.autograd.grad(out.square().sum(), list(module.parameters()), allow_unused=True)
        results.append([out, *(g for g in gradients if g is not None), *module.buffers()])
    torch.testing.assert_close(*results)


def add_in_place(net, x, shortcut):
    x = net.norm(x)
    x += shortcut
    return F.relu_(x)


FUSED = {
    "relu": lambda net, x, shortcut: net.act(net.none(net.norm(x))),
    "sum": lambda net, x, shortcut: net.norm(x) + shortcut,
    "sum and relu": lambda net, x, shortcut: torch.relu(shortcut.add(net.none(net.norm(x)))),
    "in place": add_in_place,
    "sum of two norms": lambda net, x, shortcut: net.act(net.norm(x) + net.other(shortcut)),
}


@pytest.mark.parametrize("end", FUSED.values(), ids=FUSED)
def test_relu_and_shortcut_are_done_by_the_norm(end, some_tiles):
    net = Block(end)
    code = sparsify(net).code
    assert "relu = True" in code or "residual = " in code
    assert not any(f"{word}(" in code for word in ("act", "relu", "relu_", "add", "none"))
    assert " + " not in code
    check(net, some_tiles(2, (2, 3), 6))


def read_twice(net, x, shortcut):
    x = net.norm(x)
    return net.act(x + shortcut) * x


def changed_in_between(net, x, shortcut):
    out = net.norm(x)
    x.add_(1)
    return torch.relu(out + shortcut)


NOT_FUSED = {
    "read twice": read_twice,
    "changed in between": changed_in_between,
    "another shape": lambda net, x, shortcut: net.act(net.norm(x) + net.offset) + shortcut,
    "pooled": lambda net, x, shortcut: net.norm(x) + shortcut.mean((2, 3), keepdim=True),
    "one norm twice": lambda net, x, shortcut: net.norm(x) + net.norm(shortcut),
    "scaled": lambda net, x, shortcut: torch.add(net.norm(x), shortcut, alpha=2.0),
    "the sum read twice": lambda net, x, shortcut: (lambda y: net.act(y) + y)(net.none(net.norm(x)) * shortcut),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_what_others_see_stays_what_it_was(name, some_tiles):
    net = Block(NOT_FUSED[name])
    code = sparsify(net).code
    assert "relu = True" not in code
    assert "residual = " not in code
    with torch.set_grad_enabled(name != "changed in between"):  # autograd refuses that
        check(net, some_tiles(2, (2, 3), 6))


def test_a_relu_with_hooks_runs_itself(some_tiles):
    net, seen = Block(FUSED["relu"]), []
    net.act.register_forward_hook(lambda module, inputs, output: seen.append(output))
    sparsify(net)(images_for(some_tiles(2, (2, 3), 4), 4), some_tiles(2, (2, 3), 4))
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_nothing_but_norms_is_left_of_the_ends_of_residual_blocks(name):
    code = sparsify(create_encoder(name, drop_path_rate=0.1)).code
    assert not any(word in code for word in (" + ", ".act", "drop_path_on_tiles"))


@pytest.mark.timm
@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_theirs_too(timm, package, some_tiles):
    import torchvision

    net = timm.create_model("resnet18", drop_path_rate=0.3) if package == "timm" else torchvision.models.resnet18()
    net = nn.Sequential(*list(net.children())[:-2])
    assert " + " not in sparsify(net).code
    assert "relu" not in sparsify(net).code.replace("relu = True", "")
    check(awake(net, torch.float64), some_tiles(2, (2, 3), 6), cell=32)
