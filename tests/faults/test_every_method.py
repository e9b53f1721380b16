"""Row 7 for every method: a run that is cut off and resumed is the unbroken one bit for bit.

Within this process, because a start of the command costs seconds; tests/faults/test_process.py has it with kills.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fastmim.data.dali_trial import why_not
from fastmim.engine.checkpoint import read_checkpoint
from fastmim.methods import list_methods
from fastmim.train import main

_VIT = {
    "model": "vit_tiny_patch16_224",
    "model.patch_size": 8,
    "model.drop_path_rate": 0.2,
    "model.kwargs": '{"depth": 2, "embed_dim": 48}',
    "img_size": 32,
}
_CNN = {"model.drop_path_rate": 0.1, "img_size": 64}
SETTINGS = {
    "mae": {**_VIT, "method.decoder_depth": 1, "method.decoder_dim": 32, "method.decoder_num_heads": 2},
    "simmim": _VIT,
    "a2mim": _VIT,
    "mixedae": {**_VIT, "method.decoder_depth": 1, "method.decoder_dim": 32, "method.decoder_num_heads": 2},
    "spark": {**_CNN, "model": "resnet18", "model.kwargs": '{"layers": [1, 1, 1, 1]}', "method.decoder_width": 32},
    "fcmae": {**_CNN, "model": "convnextv2_atto", "method.decoder_dim": 32},
}


class CutOff(Exception):
    pass


def words(name: str, pipeline: str, root: Path, out: Path) -> list[str]:
    settings = {
        "method": name,
        "data.pipeline": pipeline,
        **SETTINGS[name],
        "data.root": root,
        "data.workers": 1,
        "batch_size": 8,
        "max_steps": 4,
        "optim.lr": 1e-3,
        "engine.device": "cpu",
        "engine.checkpoint_every": 2,
        "engine.ema": 0.9,
        "log.every": 1,
        "log.tensorboard": "false",
        "log.progress": "none",
        "out": out,
    }
    return [f"--{key}={value}" for key, value in settings.items()]


def result(out: Path):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    told = [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in lines]
    return told, read_checkpoint(out / "checkpoints" / "step-00000004").tensors


_needs_dali = pytest.mark.skipif(bool(why_not()), reason=why_not() or "DALI is there")


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["pillow", pytest.param("dali", marks=[pytest.mark.dali, _needs_dali])])
@pytest.mark.parametrize("name", list_methods())
def test_resuming_is_bitwise_the_unbroken_run(name, pipeline, tmp_path, jpeg_folder, monkeypatch):
    """A method without an entry in SETTINGS fails here: give it one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        main(words(name, pipeline, jpeg_folder, tmp_path / "whole"))

        def cut(where, number=None):
            if (where, number) == ("step", 4):
                raise CutOff
            return 1.0

        monkeypatch.setattr("fastmim.engine.trainer.inject", cut)
        with pytest.raises(CutOff):
            main(words(name, pipeline, jpeg_folder, tmp_path / "broken"))
        monkeypatch.undo()
        main(words(name, pipeline, jpeg_folder, tmp_path / "broken"))
    finally:
        torch.set_num_threads(threads)
    assert "Resumed from" in (tmp_path / "broken" / "train.log").read_text()
    (lines, weights), (again, resumed) = result(tmp_path / "whole"), result(tmp_path / "broken")
    assert again == lines
    assert len({line["loss"] for line in lines}) == 4
    assert weights.keys() == resumed.keys() == {"method", "optimizer", "ema"}
    for group, tensors in weights.items():
        assert [name for name, tensor in tensors.items() if not torch.equal(tensor, resumed[group][name])] == []
    shutil.rmtree(tmp_path)
