import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastmim.engine import checkpoint as checkpoint_module
from fastmim.engine.checkpoint import (
    CheckpointStore,
    check_fits,
    find_checkpoint,
    misfits,
    read_checkpoint,
    warn_if_not_finite,
)
from fastmim.engine.errors import CheckpointError
from fastmim.engine.tensor_file import write_tensors


def tensors(value=1.0):
    return {"method": {"a": torch.full((3, 4), value), "n": torch.tensor(7)}, "optimizer": {"step/a": torch.ones(())}}


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path, keep=3)


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def test_every_dtype_and_layout_goes_round(tmp_path):
    torch.manual_seed(0)
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    given = {str(d): torch.randn(3, 5).to(d) for d in dtypes}
    given |= {
        "bool": torch.tensor([True, False, True]),
        "u8": torch.arange(7, dtype=torch.uint8),
        "i8": torch.tensor(-3, dtype=torch.int8),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.randn(4, 6).T,
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "slice": torch.randn(10)[2:5],
        "ünïcode": torch.ones(1),
    }
    given["tied"] = given["scalar"]
    facts = write_tensors(tmp_path / "t.safetensors", given)
    found = load_file(tmp_path / "t.safetensors")
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert facts["bytes"] == (tmp_path / "t.safetensors").stat().st_size


def test_the_file_is_the_one_that_safetensors_itself_writes(tmp_path):
    given = {"b": torch.randn(5, 3), "a": torch.arange(3), "c": torch.ones(2), "d": torch.ones(1, dtype=torch.bool)}
    write_tensors(tmp_path / "ours", given)
    save_file(given, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("value", [torch.eye(3).to_sparse(), "text", torch.ones(2, dtype=torch.complex64)])
def test_what_the_format_does_not_know_is_named(tmp_path, value):
    with pytest.raises(ValueError, match="strange"):
        write_tensors(tmp_path / "t", {"strange": value})


def test_saved_state_comes_back(store):
    path = store.save(200, tensors(3.0), {"rng": {"x": [1, 2]}, "loss": 0.1})
    assert path.name == "step-00000200"
    found = store.newest()
    assert found.step == 200
    assert found.state["rng"] == {"x": [1, 2]}
    assert found.state["loss"] == 0.1
    assert torch.equal(found.tensors["method"]["a"], torch.full((3, 4), 3.0))
    assert find_checkpoint(path).step == 200


def test_the_newest_k_stay(store):
    for step in (10, 20, 30, 40, 100):
        store.save(step, tensors(), {})
    assert names(store) == ["step-00000030", "step-00000040", "step-00000100"]


def test_leftovers_are_swept(store):
    store.save(10, tensors(), {})
    (store.folder / ".tmp-step-00000020-99").mkdir()
    (store.folder / ".tmp-step-00000020-99" / "method.safetensors").write_bytes(b"x")
    store.sweep()
    assert names(store) == ["step-00000010"]


def truncate(path):
    os.truncate(path, path.stat().st_size - 3)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, os.unlink])
@pytest.mark.parametrize("file", ["method.safetensors", "optimizer.safetensors", "state.json"])
def test_damage_is_found_and_the_one_before_used(store, damage, file, caplog):
    store.save(10, tensors(1.0), {"note": "some text so that the middle of the file is content"})
    last = store.save(20, tensors(2.0), {"note": "some text so that the middle of the file is content"})
    damage(last / file)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(last)
    assert store.newest().step == 10
    assert "damaged" in caplog.text
    assert names(store) == ["damaged-step-00000020", "step-00000010"]


def test_a_run_folder_means_its_newest_checkpoint_and_damage_is_final(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    store.folder.mkdir()
    store.save(10, tensors(), {})
    last = store.save(20, tensors(), {})
    assert find_checkpoint(tmp_path).step == 20
    truncate(last / "method.safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        find_checkpoint(tmp_path / "nowhere")


class Kill(BaseException):
    pass


def test_any_prefix_of_the_writing_leaves_the_older_checkpoint(store, monkeypatch):
    """Stop before each file and before the rename, leaving what a kill would leave."""
    store.save(10, tensors(1.0), {})
    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", lambda *_, **__: None)
    for stop_at in range(1, 5):
        calls = []

        def kill(where, calls=calls, stop_at=stop_at):
            calls.append(where)
            if len(calls) == stop_at:
                raise Kill

        monkeypatch.setattr(checkpoint_module, "inject", kill)
        with pytest.raises(Kill):
            store.save(20, tensors(2.0), {})
        assert store.newest().step == 10
        shutil.move(next(store.folder.glob(".tmp-*")), store.folder.parent / f"left-{stop_at}")
    monkeypatch.setattr(checkpoint_module, "inject", lambda where: None)
    store.save(20, tensors(2.0), {})
    assert store.newest().step == 20


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_refusing_disk_leaves_the_older_checkpoint_and_no_temporary(store, monkeypatch, number):
    store.save(10, tensors(), {})

    def refuse(where):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint_module, "inject", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        store.save(20, tensors(), {})
    assert names(store) == ["step-00000010"]


def test_too_little_space_is_seen_before_writing(store, monkeypatch):
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(OSError, match="needed") as caught:
        store.save(20, tensors(), {})
    assert caught.value.errno == errno.ENOSPC
    assert names(store) == []


def test_an_old_one_that_cannot_be_removed_is_a_warning(store, monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError(errno.EBUSY, "busy")

    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", refuse)
    for step in (1, 2, 3, 4):
        store.save(step, tensors(), {})
    assert "cannot be removed" in caplog.text
    assert store.newest().step == 4


def test_the_same_step_again_keeps_the_old_one_aside(store):
    store.save(10, tensors(1.0), {})
    store.save(10, tensors(2.0), {})
    assert names(store) == ["step-00000010", "superseded-step-00000010"]
    assert float(store.newest().tensors["method"]["a"][0, 0]) == 2.0


def test_misfits_are_named():
    here = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    there = {"a": torch.zeros(2, 2), "c": torch.zeros(1, dtype=torch.float16), "d": torch.zeros(1)}
    assert misfits(here, there) == [
        "b is missing",
        "d is not expected",
        "a is [2, 2], expected [2]",
        "c is torch.float16, expected torch.float32",
    ]
    with pytest.raises(CheckpointError, match="b is missing"):
        check_fits("checkpoint", here, there)


def test_nan_weights_are_warned_of(caplog):
    warn_if_not_finite("checkpoint", {"a": torch.tensor([float("nan")])})
    assert "NaN" in caplog.text


def test_a_file_name_that_leaves_the_folder_is_refused(store):
    path = store.save(10, tensors(), {})
    state = json.loads((path / "state.json").read_text())
    del state["sha256"]
    state["files"]["../../secret"] = {"bytes": 1, "sha256": ""}
    state["sha256"] = checkpoint_module._digest(state)
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="no file name"):
        read_checkpoint(path)


@pytest.mark.parametrize("header", [b"\xff" * 8, (10**12).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"[]"])
def test_a_malicious_header_is_an_error_even_with_a_right_checksum(store, header):
    import hashlib

    path = store.save(10, tensors(), {})
    content = header + b"\0" * 64
    (path / "method.safetensors").write_bytes(content)
    state = json.loads((path / "state.json").read_text())
    del state["sha256"]
    state["files"]["method.safetensors"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    state["sha256"] = checkpoint_module._digest(state)
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="no safetensors file"):
        read_checkpoint(path)
