"""Checkpoints from elsewhere: rows 50 to 53 of the fault table, on the real commands."""

import hashlib
import json
import os
import shutil

import pytest
import torch

from fastmim.engine.checkpoint import CheckpointStore, read_checkpoint
from tests.faults.command import ending, run, train

pytestmark = pytest.mark.slow


class Payload:
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def pickled(tmp_path) -> bytes:
    import pickle

    return pickle.dumps(Payload(str(tmp_path / "executed")))


def test_a_pickle_is_no_checkpoint_and_does_not_run(tmp_path, finished):
    evil = finished / "checkpoints" / "step-00000012" / "method.safetensors"
    evil.write_bytes(pickled(tmp_path))
    answered = train(finished, resume=evil.parent)
    assert answered.returncode == 2
    assert "damaged" in answered.stderr
    assert not (tmp_path / "executed").exists()


def test_files_that_can_run_code_are_refused_whatever_they_hold(tmp_path):
    """Row 51: no version of torch is asked to read them."""
    (tmp_path / "weights.pth").write_bytes(pickled(tmp_path))
    for module, words in (("fastmim.export", []), ("fastmim.evaluate", ["--checkpoint"])):
        place = ["knn"] if words else []
        done = run(module, *place, *words, tmp_path / "weights.pth")
        assert done.returncode == 2, done.stderr
        assert "only .safetensors files are read (others can run code when they are loaded)" in done.stderr
    assert not (tmp_path / "executed").exists()


def header(entries: dict[str, object]) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


EVIL = {
    "a huge header": (10**15).to_bytes(8, "little") + bytes(64),
    "overlapping offsets": header(
        {name: {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]} for name in ("a", "b")}
    ),
    "a negative shape": header({"a": {"dtype": "F32", "shape": [-8], "data_offsets": [0, 32]}}),
    "an unknown dtype": header({"a": {"dtype": "OBJECT", "shape": [8], "data_offsets": [0, 32]}}),
    "a file too short": header({"a": {"dtype": "F32", "shape": [4096], "data_offsets": [0, 16384]}}),
}


def with_right_checksums(checkpoint, content):
    """As somebody writes it who knows the format and means harm."""
    (checkpoint / "method.safetensors").write_bytes(content)
    state = json.loads((checkpoint / "state.json").read_text())
    del state["sha256"]
    state["files"]["method.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    state["sha256"] = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    (checkpoint / "state.json").write_text(json.dumps(state))


def test_malicious_headers_are_passed_over_though_their_checksums_are_right(tmp_path, finished):
    """All in one run folder: each is set aside with its reason, and the good one before them is used."""
    good = finished / "checkpoints" / "step-00000004"
    for number, content in enumerate(EVIL.values(), 20):
        copy = shutil.copytree(good, finished / "checkpoints" / f"step-{number:08d}")
        with_right_checksums(copy, content)
    for step in (8, 12):
        shutil.rmtree(finished / "checkpoints" / f"step-{step:08d}")
    done = train(finished, max_steps=6)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is no safetensors file") == len(EVIL)
    assert "step-00000004" in done.stdout


def test_tensors_that_do_not_fit_are_named_before_any_is_used(finished):
    found = read_checkpoint(finished / "checkpoints" / "step-00000012")
    method = found.tensors["method"]
    method["stranger"] = method.pop("encoder.cls_token")
    for name, change in (("encoder.norm.weight", torch.Tensor.double), ("encoder.norm.bias", lambda t: t.repeat(2))):
        method[name] = change(method[name])
    save(finished, 13, found)
    done = train(finished, max_steps=14)
    assert done.returncode == 2, done.stderr
    for problem in (
        "encoder.cls_token is missing",
        "stranger is not expected",
        "encoder.norm.weight is torch.float64, expected torch.float32",
        "encoder.norm.bias is [96], expected [48]",
    ):
        assert problem in done.stderr
    assert "Traceback" not in done.stderr


def save(folder, step, found):
    """As a checkpoint of this run, with everything right but what its tensors hold."""
    state = {key: value for key, value in found.state.items() if key not in ("files", "format", "step")}
    CheckpointStore(folder / "checkpoints").save(step, found.tensors, state)


def test_nan_weights_are_told_and_never_trained_on(finished):
    found = read_checkpoint(finished / "checkpoints" / "step-00000012")
    found.tensors["method"]["encoder.cls_token"].fill_(float("nan"))
    save(finished, 13, found)
    done = train(finished, max_steps=14)
    assert "holds NaN or infinite values in encoder.cls_token" in done.stderr
    assert done.returncode == 4, done.stderr
    assert ending(finished)["code"] == 4
