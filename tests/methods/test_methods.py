"""What holds for every method."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmim.methods import Batch, Method, create_method, list_methods, method_config
from fastmim.methods.a2mim import A2MIMConfig, FrequencyConfig
from fastmim.methods.fcmae import FCMAEConfig
from fastmim.methods.mixedae import MixedAEConfig
from fastmim.methods.spark import SparKConfig
from fastmim.models import create_encoder
from tests.methods.encoders import small_convnext, small_convnextv2, small_resnet, small_vit

CASES = {
    "mae-vit": ("mae", lambda **kw: small_vit(32, 8, **kw), None, (32, 32)),
    "simmim-vit": ("simmim", lambda **kw: small_vit(32, 8, **kw), None, (32, 32)),
    "simmim-resnet": ("simmim", small_resnet, None, (32, 64)),
    "a2mim-vit": ("a2mim", lambda **kw: small_vit(32, 8, **kw), None, (32, 32)),
    "a2mim-vit-code": (
        "a2mim",
        lambda **kw: small_vit(32, 8, **kw),
        A2MIMConfig(freq=FrequencyConfig(form="code")),
        (32, 32),
    ),
    "a2mim-resnet": ("a2mim", small_resnet, None, (32, 64)),
    "a2mim-convnext": ("a2mim", small_convnext, None, (64, 64)),
    "a2mim-resnet-tiles": ("a2mim", small_resnet, A2MIMConfig(tiles=True), (64, 96)),
    "spark-resnet": ("spark", small_resnet, SparKConfig(decoder_width=32), (64, 96)),
    "spark-convnext": ("spark", small_convnext, SparKConfig(decoder_width=64), (96, 64)),
    "spark-light": ("spark", small_resnet, SparKConfig(decoder="light", decoder_width=32), (64, 96)),
    "mixedae-vit": ("mixedae", lambda **kw: small_vit(32, 8, **kw), MixedAEConfig(projector="mlp"), (32, 32)),
    "mixedae-odd": ("mixedae", lambda **kw: small_vit((24, 40), 8, **kw), MixedAEConfig(group_size=2), (24, 40)),
    "mixedae-pairs": (
        "mixedae",
        lambda **kw: small_vit(32, 8, **kw),
        MixedAEConfig(group_size=2, mixing="full", attention="oracle", homo_layers=(0, 1)),
        (32, 32),
    ),
    "fcmae-convnext": ("fcmae", small_convnextv2, FCMAEConfig(decoder_dim=32), (64, 96)),
    "fcmae-batch": ("fcmae", small_convnextv2, FCMAEConfig(decoder_dim=32, grn_stats="batch"), (64, 64)),
}
every_case = pytest.mark.parametrize("case", CASES)


def build(case: str, **kwargs) -> Method:
    name, encoder, cfg, img_size = CASES[case]
    torch.manual_seed(0)
    return create_method(name, encoder(**kwargs), cfg, img_size)


def batch_for(method: Method, size: int = 4, step: int = 0, first: int = 0) -> Batch:
    """Smooth images, which a method can learn."""
    generator = torch.manual_seed(1)
    coarse = torch.randn(size, method.encoder.in_chans, 3, 3, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=method.img_size, mode="bilinear")
    return Batch(images, torch.tensor([11, step, first]))


@every_case
def test_loss_falls_in_thirty_steps_on_one_batch(case):
    method = build(case).train()
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    batch, losses = batch_for(method, size=4), []
    for _ in range(30):
        output = method(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.85 * losses[0], losses[::5]


@every_case
def test_pictures_keep_visible_pixels_and_show_what_was_hidden(case):
    method = build(case).eval()
    batch = batch_for(method)
    pictures = method(batch).pictures()
    assert pictures.original is batch.images
    changed = (pictures.reconstruction != batch.images).any(dim=1)
    hidden = (pictures.masked != batch.images).any(dim=1)
    assert pictures.reconstruction.shape == pictures.masked.shape == batch.images.shape
    assert not (changed & ~hidden).any()
    assert 0.4 < hidden.float().mean().item() < 0.9
    assert not pictures.reconstruction.requires_grad


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_an_fp32_finite_loss_and_gradients(case, dtype):
    method = build(case).train()
    with torch.autocast("cpu", dtype=dtype):
        output = method(batch_for(method))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.isfinite()
    for name, part in output.parts.items():
        assert part.dtype == torch.float32, name
        assert not part.requires_grad, name
    for name, parameter in method.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@every_case
def test_a_step_neither_asks_the_device_for_values_nor_shapes(case):
    method = build(case).train()
    # From a fake tensor neither a value nor a data-dependent shape can be had.
    with FakeTensorMode(allow_non_fake_inputs=True):
        output = method(Batch(torch.randn(4, 3, *method.img_size), torch.zeros(3, dtype=torch.int64)))
        output.loss.backward()
    assert output.loss.shape == ()


@every_case
def test_masks_are_a_function_of_seed_step_and_position(case):
    method = build(case).train()  # with batch statistics, or a new deep decoder predicts nothing but zeros
    with torch.no_grad():
        loss = method(batch_for(method, step=3)).loss
        assert method(batch_for(method, step=3)).loss == loss
        assert method(batch_for(method, step=4)).loss != loss
        assert method(batch_for(method, step=3, first=100)).loss != loss


@pytest.mark.parametrize("case", ["mae-vit", "simmim-vit"])
def test_a_batch_is_the_mean_of_its_halves(case):
    method = build(case).eval()
    whole = batch_for(method, size=4)
    halves = [Batch(whole.images[i : i + 2], torch.tensor([11, 0, i])) for i in (0, 2)]
    with torch.no_grad():
        expected = sum(method(half).loss for half in halves) / 2
        torch.testing.assert_close(method(whole).loss, expected)


@every_case
def test_the_exported_encoder_gives_the_same_features(case):
    method = build(case)
    method.encoder.train()
    method(batch_for(method)).loss.backward()
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.1 * parameter.grad)
    encoder = method.encoder.eval()
    fresh = create_encoder(encoder.name, **encoder.timm_kwargs).eval()
    fresh.load_state_dict(encoder.state_dict(), strict=True)
    images = batch_for(method).images
    assert torch.equal(fresh(images), encoder(images))


@every_case
def test_every_trained_parameter_gets_a_gradient(case):
    method = build(case)
    method(batch_for(method)).loss.backward()
    missing = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert [name for name in missing if not name.startswith("encoder.head")] == []  # the head's norm serves evaluation


def test_methods_are_named_without_being_imported():
    code = "import sys, fastmim.methods as m; m.list_methods(); assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_method_gets_the_nearest_name():
    with pytest.raises(ValueError, match="Did you mean 'simmim'"):
        method_config("simmin")
    with pytest.raises(ValueError, match="Did you mean 'a2mim'"):
        method_config("A²MIM")


def test_settings_of_another_method_are_refused():
    with pytest.raises(ValueError, match="takes a MAEConfig, got a A2MIMConfig"):
        create_method("mae", small_vit(32, 8), A2MIMConfig(), 32)


@pytest.mark.parametrize("name", list_methods())
def test_every_setting_has_a_default_and_a_docstring(name):
    import ast
    import inspect

    config = method_config(name)
    config()
    tree = ast.parse(inspect.getsource(config)).body[0]
    assert isinstance(tree, ast.ClassDef)
    documented = {
        before.target.id
        for before, after in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(before, ast.AnnAssign)
        and isinstance(before.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }
    assert documented == {item.name for item in dataclasses.fields(config)}


def test_a_batch_moves_whole():
    batch = Batch(torch.zeros(2, 3, 4, 4), torch.zeros(3, dtype=torch.int64), torch.tensor([1, 2]))
    moved = batch.to("meta")
    assert (moved.images.device.type, moved.rng.device.type, moved.labels.device.type) == ("meta",) * 3
    assert moved.indices is None
    assert moved.size == 2
