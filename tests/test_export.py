"""`python -m fastmim.export`: files that appear complete or not at all, and the line that loads them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fastmim.command_line import command
from fastmim.evaluation import load_encoder
from fastmim.export import export_encoder, main
from fastmim.models import create_encoder
from tests.small_run import MEAN, SMALL_VIT, STD, small_encoder, write_run


def run(*argv, capsys):
    with pytest.raises(SystemExit) as end:
        command(main, [str(word) for word in argv])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_writes_weights_and_config_and_says_how_to_load_them(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    code, out, err = run(folder, capsys=capsys)
    file = folder / "export" / "model.safetensors"
    assert (code, err) == (0, "")
    assert sorted(path.name for path in file.parent.iterdir()) == ["config.json", "model.safetensors"]
    expected = small_encoder(10).state_dict()
    assert load_file(file).keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in load_file(file).items())
    config = json.loads(file.with_name("config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["num_features"]) == ("vit_tiny_patch16_224", 0, 24)
    assert config["model_args"] == {"num_classes": 0, **SMALL_VIT}
    assert config["pretrained_cfg"]["input_size"] == [1, 32, 32]
    assert (config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"]) == ([*MEAN], [*STD])
    assert "after 10 steps" in out
    line = out.splitlines()[-3]
    assert out.splitlines()[-1] == f'  model = timm.create_model("local-dir:{file.parent}", pretrained=True)'
    assert line.startswith(
        f'  model = timm.create_model("vit_tiny_patch16_224", checkpoint_path="{file}", num_classes=0'
    )


def test_a_checkpoint_goes_to_its_runs_export_and_another_folder_may_be_given(tmp_path, capsys):
    checkpoint = write_run(tmp_path / "run", ema=True) / "checkpoints" / "step-00000005"
    code, out, _ = run(checkpoint, capsys=capsys)
    assert code == 0
    assert "after 5 steps, averaged weights" in out
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    assert run(checkpoint, "--out", tmp_path / "a" / "b", capsys=capsys)[0] == 0
    assert torch.equal(load_encoder(tmp_path / "a" / "b")[0].norm.weight, small_encoder(6).norm.weight)


def test_an_export_that_fails_leaves_the_one_before_it(tmp_path, monkeypatch):
    export_encoder(small_encoder(1), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(path, tensors):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastmim.engine.tensor_file.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        export_encoder(small_encoder(2), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("channels, length", [(1, 1), (3, 3), (13, 13)])
def test_every_channel_has_a_mean_and_a_deviation(tmp_path, channels, length):
    export_encoder(create_encoder("convnext_atto", in_chans=channels), tmp_path, img_size=(64, 96))
    trained = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert (len(trained["mean"]), len(trained["std"])) == (length, length)
    assert trained["input_size"] == [channels, 64, 96]


@pytest.mark.parametrize(
    "argv, message",
    [
        ("", "RUN is missing: python -m fastmim.export RUN"),
        ("nowhere", "nowhere: there is no such run"),
        ("RUN --oot x", "oot: there is no such setting; did you mean out?"),
        ("RUN --out RUN/config.yaml", "is a file, not a folder"),
        ("RUN --out RUN/config.yaml/x", "cannot be written"),
        ("random:resnet18", "a random encoder belongs to no run, say --out DIR"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(argv, message, tmp_path, capsys):
    folder = write_run(tmp_path / "run", steps=(1,))
    code, out, err = run(*argv.replace("RUN", str(folder)).split(), capsys=capsys)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
