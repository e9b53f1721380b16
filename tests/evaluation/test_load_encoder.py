"""load_encoder: every place an encoder may lie, and clear words where it does not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastmim.evaluation import load_encoder
from fastmim.evaluation.encoders import load_weights
from fastmim.export import export_encoder
from fastmim.models import create_encoder
from tests.small_run import MEAN, STD, small_encoder, write_run


def equal(one, other):
    mine, others = one.state_dict(), other.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[key], others[key]) for key in mine)


def test_a_run_means_its_newest_checkpoint(tmp_path):
    run = write_run(tmp_path / "run")
    encoder, meta = load_encoder(run)
    assert equal(encoder, small_encoder(10))
    assert (meta.name, meta.img_size, meta.in_chans) == ("vit_tiny_patch16_224", (32, 32), 1)
    assert (meta.mean, meta.std, meta.step, meta.averaged) == (MEAN, STD, 10, False)
    assert meta.path == run / "checkpoints" / "step-00000010"


def test_a_checkpoint_or_its_file_means_itself(tmp_path):
    checkpoint = write_run(tmp_path / "run") / "checkpoints" / "step-00000005"
    assert equal(load_encoder(checkpoint)[0], small_encoder(5))
    assert equal(load_encoder(str(checkpoint / "method.safetensors"))[0], small_encoder(5))


def test_averaged_weights_are_preferred(tmp_path):
    encoder, meta = load_encoder(write_run(tmp_path / "run", ema=True))
    assert meta.averaged
    assert equal(encoder, small_encoder(11))


@pytest.mark.parametrize("spec", ["export", "export/model.safetensors"])
def test_an_export_means_itself(tmp_path, spec):
    export_encoder(small_encoder(), tmp_path / "export", mean=MEAN, std=STD, img_size=(32, 32))
    encoder, meta = load_encoder(tmp_path / spec)
    assert equal(encoder, small_encoder())
    assert (meta.img_size, meta.in_chans, meta.mean, meta.std, meta.step) == ((32, 32), 1, MEAN, STD, None)


def test_an_export_with_a_classifier_and_in_half_precision(tmp_path):
    model = create_encoder("resnet18", num_classes=7)
    export_encoder(model, tmp_path)
    file = tmp_path / "model.safetensors"
    halved = {key: value.half() if value.is_floating_point() else value for key, value in load_file(file).items()}
    save_file(halved, file)
    encoder, meta = load_encoder(file)
    assert encoder.fc.weight.dtype == torch.float32
    torch.testing.assert_close(encoder.fc.weight, model.fc.weight, atol=1e-3, rtol=1e-3)
    assert meta.img_size == (224, 224)


def test_random_weights_are_those_of_the_seed_and_leave_torchs_own_draws_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, meta = load_encoder("random:resnet18", seed=1, in_chans=1)
    assert torch.equal(torch.rand(3), expected)
    assert (meta.name, meta.in_chans, meta.img_size, meta.path) == ("resnet18", 1, None, None)
    assert equal(first, load_encoder("random:resnet18", seed=1, in_chans=1)[0])
    assert not equal(first, load_encoder("random:resnet18", seed=2, in_chans=1)[0])


def test_random_of_a_run_is_its_encoder_with_new_weights(tmp_path):
    run = write_run(tmp_path / "run")
    encoder, meta = load_encoder(f"random:{run}")
    assert encoder.state_dict().keys() == small_encoder().state_dict().keys()
    assert not equal(encoder, small_encoder(10))
    assert (meta.step, meta.path, meta.mean, meta.img_size) == (None, None, MEAN, (32, 32))


def test_size_of_a_new_encoder():
    name = "random:vit_tiny_patch16_224"
    assert load_encoder(name)[1].img_size == (224, 224)
    assert load_encoder(name, default_img_size=(64, 32))[1].img_size == (64, 32)
    assert load_encoder(name, default_img_size=(64, 32), img_size=(32, 32))[1].img_size == (32, 32)
    assert load_encoder("random:resnet18", img_size=(32, 48))[1].img_size == (32, 48)


def test_a_transformer_keeps_the_size_it_was_trained_for(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="takes images of 32x32, but 64x64 was asked for"):
        load_encoder(run, img_size=(64, 64))
    cnn = write_run(tmp_path / "cnn", encoder=create_encoder("resnet18", in_chans=1, img_size=32))
    assert load_encoder(cnn, img_size=(64, 64))[1].img_size == (64, 64)


def test_weights_that_do_not_fit_leave_the_encoder_as_it_was():
    encoder = small_encoder()
    weights = dict(small_encoder(4).state_dict())
    weights["norm.weight"] = torch.ones(25)
    del weights["cls_token"]
    weights["stranger"] = torch.ones(1)
    with pytest.raises(
        ValueError, match=r"(?s)FILE.*cls_token is missing.*stranger.*norm.weight is \[25\], expected \[24\]"
    ):
        load_weights(encoder, weights, "FILE")
    assert equal(encoder, small_encoder())


@pytest.mark.parametrize(
    "spec, message",
    [
        ("nowhere", "nowhere: there is no such run"),
        ("random:vit_tony_patch16_224", "unknown encoder 'vit_tony_patch16_224'.*vit_tiny_patch16_224"),
        ("empty", "holds no checkpoints"),
        ("weights.pth", "only .safetensors files are read"),
        ("alone/model.safetensors", "config.json is missing"),
        ("unfinished", "there is no checkpoint in"),
    ],
)
def test_says_what_is_not_there(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "alone", "unfinished/checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "weights.pth").write_bytes(b"")
    save_file({"a": torch.ones(1)}, tmp_path / "alone" / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_encoder(spec)


@pytest.mark.parametrize(
    "config, message",
    [
        ("{", "cannot be read as an encoder"),
        ("[]", "cannot be read as an encoder"),
        ('{"architecture": "vit_huge_pluss"}', "unknown encoder 'vit_huge_pluss'"),
        ('{"architecture": "resnet18", "model_args": {"layer": 3}}', "unknown option 'layer'"),
        ('{"architecture": "resnet18", "pretrained_cfg": {"input_size": [3, 0, 0]}}', "input_size"),
        ('{"architecture": "resnet18"}', "does not hold a resnet18: .* is missing"),
    ],
)
def test_says_what_is_wrong_with_an_export(tmp_path, config, message):
    export_encoder(small_encoder(), tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        load_encoder(tmp_path)


def test_says_what_is_wrong_with_a_file(tmp_path):
    export_encoder(small_encoder(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot be read as an encoder"):
        load_encoder(file)


def test_damage_and_a_missing_description_are_found(tmp_path):
    run = write_run(tmp_path / "run")
    newest = run / "checkpoints" / "step-00000010"
    content = bytearray((newest / "method.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "method.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"checksum of method.safetensors does not match"):
        load_encoder(run)
    other = shutil.copytree(run / "checkpoints" / "step-00000005", tmp_path / "step-00000005")
    state = json.loads((other / "state.json").read_text())
    (other / "state.json").write_text(json.dumps(state | {"meta": {}}))
    with pytest.raises(ValueError, match=r"checksum of state.json|does not describe an encoder"):
        load_encoder(other)
