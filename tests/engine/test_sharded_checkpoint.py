"""Checkpoints that each process writes its part of: what they hold, who can read them, and what a failure costs."""

import errno
import functools
import hashlib
import json
import os
import shutil
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from fastmim.engine import DiskFullError, RunFolder, sharded_checkpoint
from fastmim.engine import checkpoint as checkpoint_module
from fastmim.engine import trainer as trainer_module
from fastmim.engine.checkpoint import CheckpointStore, find_checkpoint, read_checkpoint
from fastmim.engine.errors import CheckpointError
from fastmim.engine.pieces import Piece, share_of_rows
from fastmim.engine.sharded_checkpoint import ShardedCheckpoint, save_sharded
from tests.engine.processes import in_processes
from tests.engine.tiny_run import DrawnLoader, TinyMethod, read_metrics, tiny_run, tiny_trainer

SHARDED = {"checkpoint": "sharded", "ema": 0.9}
FSDP = {"parallel": "fsdp", "ema": 0.9}


def tensors(value=1.0):
    return {
        "method": {"a": torch.full((5, 3), value), "n": torch.tensor(7), "h": torch.full((4,), value).bfloat16()},
        "optimizer": {"step/a": torch.tensor(2.0), "exp_avg/a": torch.randn(5, 3)},
    }


def save(store, step, given, state=None):
    pieces = {group: {k: Piece(t, t.shape) for k, t in part.items()} for group, part in given.items()}
    return save_sharded(store, step, pieces, state or {}, rank=0, group=None)


def assert_same(one, two):
    assert one.keys() == two.keys()
    for group in one:
        assert one[group].keys() == two[group].keys()
        assert [k for k in one[group] if not torch.equal(one[group][k], two[group][k])] == []
        assert [k for k in one[group] if one[group][k].dtype != two[group][k].dtype] == []


def saved(out, step):
    return read_checkpoint(out / "checkpoints" / f"step-{step:08d}")


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path, keep=2)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def rewrite(path, file, content):
    """Put other content into a file of a checkpoint, with the right checksums."""
    (path / file).write_bytes(content)
    state = json.loads((path / "state.json").read_text())
    del state["sha256"]
    state["files"][file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    state["sha256"] = checkpoint_module._digest(state)
    (path / "state.json").write_text(json.dumps(state))


def test_it_goes_round_whole_and_by_rows(store):
    given = tensors()
    path = save(store, 3, given, {"seed": 5})
    assert names(path) == ["method-00000.safetensors", "optimizer-00000.safetensors", "state.json"]
    found = store.newest()
    assert isinstance(found, ShardedCheckpoint)
    assert (found.step, found.state["seed"]) == (3, 5)
    assert_same(found.tensors, given)
    for size in (1, 2, 3, 7):
        for rank in range(size):
            first, rows = share_of_rows(5, rank, size)
            piece = Piece(torch.empty(rows, 3), torch.Size([5, 3]), first, spread=True)
            part = found.rows({"optimizer": {"exp_avg/a": piece}})["optimizer"]["exp_avg/a"]
            assert torch.equal(part, given["optimizer"]["exp_avg/a"][first : first + rows])


def test_the_files_are_safetensors_that_torch_reads_by_itself(store):
    given = tensors()
    path = save(store, 3, given)
    assert torch.equal(load_file(path / "method-00000.safetensors")["method/a"], given["method"]["a"])
    into = {"method/a": torch.zeros(5, 3)}
    with pytest.warns(UserWarning, match="single process"):
        torch.distributed.checkpoint.load(into, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    assert torch.equal(into["method/a"], given["method"]["a"])


def test_the_newest_stay(store):
    for step in (1, 2, 3):
        save(store, step, tensors())
    assert names(store.folder) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "strange", "no state"])
def test_a_damaged_one_is_set_aside_for_the_one_before(store, damage):
    good = tensors(1.0)
    save(store, 1, good)
    path = save(store, 2, tensors(2.0))
    file = path / "method-00000.safetensors"
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[:-1])
    elif damage == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        file.unlink()
    elif damage == "strange":
        shutil.copy(file, path / "method-00001.safetensors")
    else:
        (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        find_checkpoint(path)
    found = store.newest()
    assert found.step == 1
    assert_same(found.tensors, good)
    assert "damaged-step-00000002" in names(store.folder)


@pytest.mark.parametrize(
    "rows, offsets",
    [
        ({"method/a": torch.ones(3, 3)}, {"method/a": {"saved_offsets": [2, 0]}}),  # the first two are nowhere
        ({"method/a": torch.ones(3, 3)}, {"method/a": {"saved_offsets": [0, 1]}}),
        ({"method/a": torch.ones(3, 3)}, {"method/a": {"saved_offsets": "x"}}),
        ({"method/a": torch.ones(3, 3)}, {}),
        ({"method/a": torch.ones(3, 3)}, []),
    ],
)
def test_headers_that_make_no_whole_tensors_are_refused_even_with_right_checksums(store, tmp_path, rows, offsets):
    path = save(store, 1, tensors())
    save_file(rows, tmp_path / "x", {"DCP_SHARDING_INFO": json.dumps(offsets)})
    rewrite(path, "method-00000.safetensors", (tmp_path / "x").read_bytes())
    with pytest.raises(CheckpointError, match="damaged"):
        find_checkpoint(path)


@pytest.mark.parametrize("content", [b"\xff" * 80, (10**12).to_bytes(8, "little") + b"{}"])
def test_a_malicious_header_is_an_error(store, content):
    path = save(store, 1, tensors())
    rewrite(path, "method-00000.safetensors", content)
    with pytest.raises(CheckpointError, match="damaged"):
        find_checkpoint(path)


def test_a_kill_at_any_moment_of_a_save_leaves_the_one_before(store):
    """Before each file of two, before state.json, before the rename; then at last it passes."""
    good = tensors(1.0)
    save(store, 1, good)
    torn = 0
    for moment in range(1, 6):
        child = os.fork()
        if child == 0:
            calls = iter(range(1, 100))

            def kill(*_, at=moment, calls=calls):
                if next(calls) == at:
                    os._exit(9)

            sharded_checkpoint.inject = checkpoint_module.inject = kill
            save(store, 2, tensors(2.0))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed = os.waitstatus_to_exitcode(status) == 9
        torn += killed
        assert len(list(store.folder.glob(".tmp-*"))) == killed
        store.sweep()
        assert store.newest().step == (1 if killed else 2)
    assert torn == 4
    assert names(store.folder) == ["step-00000001", "step-00000002"]


def test_a_run_in_the_sharded_format_repeats_one_in_the_plain_format(tmp_path):
    tiny_run(tmp_path / "plain", engine={"ema": 0.9})
    tiny_run(tmp_path / "sharded", engine=SHARDED)
    assert isinstance(saved(tmp_path / "sharded", 8), ShardedCheckpoint)
    for step in (4, 8, 12):
        assert_same(saved(tmp_path / "sharded", step).tensors, saved(tmp_path / "plain", step).tensors)
    path = tmp_path / "sharded" / "checkpoints" / "step-00000008"
    tiny_run(tmp_path / "resumed", resume=str(path), engine={"ema": 0.9})  # and from there on in the plain format
    assert_same(saved(tmp_path / "resumed", 12).tensors, saved(tmp_path / "plain", 12).tensors)


def test_another_method_s_is_refused_before_anything_is_touched(tmp_path):
    tiny_run(tmp_path, total=4, engine=SHARDED)
    method = TinyMethod(channels=1)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    with RunFolder(tmp_path) as run, pytest.raises(CheckpointError, match=r"encoder\.embed\.weight is \[24, 48\]"):
        tiny_trainer(run, method=method, engine=SHARDED)
    assert all(torch.equal(before[name], tensor) for name, tensor in method.state_dict().items())


@pytest.mark.parametrize("form", ["plain", "sharded"])
def test_what_is_written_beside_training_is_what_was_there_when_it_began(tmp_path, monkeypatch, form):
    engine = {"checkpoint": form, "async_save": "on"}
    tiny_run(tmp_path / "at_once", engine={**engine, "async_save": "off"})
    later, module = threading.Event(), sharded_checkpoint if form == "sharded" else checkpoint_module
    write = module.write_tensors

    def slow(*arguments):
        assert later.wait(60)
        return write(*arguments)

    class Loader(DrawnLoader):
        def __next__(self):
            if self.step == 7:  # three steps after the save of step 4 began
                later.set()
            return super().__next__()

    monkeypatch.setattr(module, "write_tensors", slow)
    tiny_run(tmp_path / "beside", engine=engine, loader=Loader)
    for step in (4, 8, 12):
        assert_same(saved(tmp_path / "beside", step).tensors, saved(tmp_path / "at_once", step).tensors)


@pytest.mark.parametrize("form", ["plain", "sharded"])
def test_a_full_disk_ends_a_run_that_saves_beside_training_after_three(tmp_path, monkeypatch, capsys, form):
    engine = {"checkpoint": form, "async_save": "on"}
    tiny_run(tmp_path, total=4, engine=engine)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sharded_checkpoint if form == "sharded" else checkpoint_module, "write_tensors", full)
    with pytest.raises(DiskFullError, match="step-00000004") as caught:
        tiny_run(tmp_path, total=40, engine=engine)
    assert caught.value.code == 5
    assert capsys.readouterr().err.count("No checkpoint at step") == 3
    assert read_metrics(tmp_path)[-1]["step"] == 20, "the third failure, of step 16, is seen at the next save"
    assert names(tmp_path / "checkpoints") == ["step-00000004"]


@pytest.mark.parametrize("form", ["plain", "sharded"])
def test_the_last_save_is_tried_whatever_became_of_those_before(tmp_path, monkeypatch, form):
    module, calls = sharded_checkpoint if form == "sharded" else checkpoint_module, []
    write = module.write_tensors

    def full_at_first(*arguments):
        calls.append(arguments)
        if len(calls) <= 3:  # the first file of steps 4, 8 and 12
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(module, "write_tensors", full_at_first)
    tiny_run(tmp_path, total=14, engine={"checkpoint": form, "async_save": "on"})
    assert names(tmp_path / "checkpoints") == ["step-00000014"]


def test_a_disk_that_is_full_at_the_end_is_an_error_at_once(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sharded_checkpoint, "write_tensors", full)
    with pytest.raises(DiskFullError):
        tiny_run(tmp_path, total=4, engine=SHARDED)


def test_a_hiccup_costs_nothing(tmp_path, monkeypatch, store):
    write, calls = sharded_checkpoint.write_tensors, []

    def once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.EIO, "injected")
        return write(*arguments)

    monkeypatch.setattr(sharded_checkpoint, "write_tensors", once)
    given = tensors()
    save(store, 1, given)
    assert_same(store.newest().tensors, given)
    assert names(store.folder) == ["step-00000001"]


def test_a_folder_that_machines_do_not_share_is_said(store, tmp_path, monkeypatch):
    write, elsewhere = sharded_checkpoint.write_tensors, tmp_path / "other machine"
    elsewhere.mkdir()
    monkeypatch.setattr(sharded_checkpoint, "write_tensors", lambda path, *rest: write(elsewhere / path.name, *rest))
    with pytest.raises(CheckpointError, match="a folder that all machines share"):
        save(store, 1, tensors())
    assert store.steps() == []
    assert not list(store.folder.glob(".tmp-*"))
    with pytest.raises(CheckpointError, match="a folder that all machines share"):
        ShardedCheckpoint(tmp_path / "step-00000001", {"files": {}})


# Several processes. Each process of a run gets its share of the images that `DrawnLoader` draws.


class Stop(Exception):
    pass


class Share(DrawnLoader):
    def __init__(self, step, world):
        super().__init__(step)
        self.world = world

    def __next__(self):
        batch, size = super().__next__(), self.world.size
        rows = slice(self.world.rank * len(batch.images) // size, (self.world.rank + 1) * len(batch.images) // size)
        batch.images, batch.indices = batch.images[rows], batch.indices[rows]
        return batch


def run_with(world, out, engine, stop=0, **settings):
    """A run, or one that ends by an exception before step `stop`."""

    def inject(where, number=None):
        if where == "step" and number == stop:
            raise Stop

    trainer_module.inject = inject
    with RunFolder(out, world=world) as run:
        trainer = tiny_trainer(run, engine=engine, loader=functools.partial(Share, world=world), **settings)
        try:
            trainer.fit()
        except Stop:
            assert stop


def assert_restored(world, place, out, engine):
    """A run that starts from the checkpoint at `place` holds what is in it."""
    with RunFolder(out, world=world) as run:
        trainer = tiny_trainer(run, engine=engine, resume=str(place))
        found = {group: {k: p.tensor for k, p in part.items()} for group, part in trainer.state.gathered().items()}
        assert_same(found, read_checkpoint(place).tensors)
        assert trainer.result.step == read_checkpoint(place).step


def in_two(world, base):
    run_with(world, base / "whole", FSDP)
    run_with(world, base / "broken", FSDP, stop=8)
    run_with(world, base / "broken", FSDP)
    run_with(world, base / "fsdp-plain", {**FSDP, "checkpoint": "plain"}, stop=6)
    run_with(world, base / "ddp-sharded", SHARDED, stop=6)
    run_with(world, base / "ddp-plain", {"ema": 0.9}, stop=6)
    run_with(world, base / "ddp-beside", {"ema": 0.9, "async_save": "on"})
    for form in ("plain", "sharded"):
        for name, engine in (("fsdp", FSDP), ("ddp", {"ema": 0.9})):
            place = base / f"one-{form}" / "checkpoints" / "step-00000004"
            assert_restored(world, place, base / f"two-{name}-from-{form}", engine)
    in_full_disk(world, base / "full")


def in_full_disk(world, out):
    """The disk of the second process is full from its second save on."""
    write, calls = sharded_checkpoint.write_tensors, []

    def full(*arguments):
        calls.append(arguments)
        if world.rank == 1 and len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    sharded_checkpoint.write_tensors = full
    with pytest.raises(DiskFullError, match="step-00000001"):
        run_with(world, out, {**FSDP, "checkpoint_every": 1})
    sharded_checkpoint.write_tensors = write


def in_four(world, base):
    for origin in ("whole", "ddp-sharded"):
        place = base / origin / "checkpoints" / "step-00000004"
        for name, engine in (("fsdp", FSDP), ("ddp", {"ema": 0.9})):
            assert_restored(world, place, base / f"four-{name}-from-{origin}", engine)
    run_with(world, base / "four", FSDP, resume=str(base / "whole" / "checkpoints" / "step-00000008"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the runs of `in_two`."""
    base = tmp_path_factory.mktemp("runs")
    for form in ("plain", "sharded"):
        tiny_run(base / f"one-{form}", total=4, engine={"checkpoint": form, "ema": 0.9})
    in_processes(2, in_two, base)
    return base


@pytest.mark.slow
def test_resuming_with_as_many_processes_is_bitwise_the_unbroken_run(runs):
    assert isinstance(saved(runs / "whole", 12), ShardedCheckpoint)
    assert len(list((runs / "whole" / "checkpoints" / "step-00000012").glob("method-*"))) == 2
    assert read_metrics(runs / "broken") == read_metrics(runs / "whole")
    assert_same(saved(runs / "broken", 12).tensors, saved(runs / "whole", 12).tensors)
    assert "Resumed with changes" not in (runs / "broken" / "train.log").read_text()


@pytest.mark.slow
def test_both_formats_hold_the_same(runs):
    assert_same(saved(runs / "fsdp-plain", 4).tensors, saved(runs / "whole", 4).tensors)
    assert_same(saved(runs / "ddp-sharded", 4).tensors, saved(runs / "ddp-plain", 4).tensors)
    assert_same(saved(runs / "ddp-beside", 4).tensors, saved(runs / "ddp-plain", 4).tensors)
    assert names(runs / "ddp-beside" / "checkpoints")[-1] == "step-00000012"


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["whole", "ddp-sharded", "fsdp-plain"])
def test_one_process_goes_on_from_what_two_saved(runs, origin, tmp_path, capsys):
    shutil.copytree(runs / origin, tmp_path / "run")
    for later in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    before = saved(runs / origin, 4).tensors
    with RunFolder(tmp_path / "run") as run:
        trainer = tiny_trainer(run, engine={"ema": 0.9})
        assert_same({g: {k: p.tensor for k, p in t.items()} for g, t in trainer.state.pieces().items()}, before)
        trainer.fit()
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == list(range(1, 13))
    told = capsys.readouterr().err
    assert "processes 2 -> 1" in told
    assert f"parallel {'ddp' if origin == 'ddp-sharded' else 'fsdp'} -> none" in told


@pytest.mark.slow
def test_four_processes_go_on_from_what_two_saved(runs):
    in_processes(4, in_four, runs)
    lines = read_metrics(runs / "four")
    assert [line["step"] for line in lines] == [9, 10, 11, 12]
    unbroken = read_metrics(runs / "whole")[8:]
    assert [line["lr"] for line in lines] == [line["lr"] for line in unbroken]
    assert len(list((runs / "four" / "checkpoints" / "step-00000012").glob("method-*"))) == 4


@pytest.mark.slow
def test_a_full_disk_of_one_process_is_told_once_and_ends_all(runs):
    out = runs / "full"
    assert names(out / "checkpoints") == ["step-00000001"]
    log = (out / "train.log").read_text()
    assert [log.count(f"No checkpoint at step {step}:") for step in (1, 2, 3, 4, 5)] == [0, 1, 1, 1, 0]
