import json

import pytest
import torch

from fastmim.data import DataConfig, DataError, TrainLoader, create_loader, create_source, normalise
from fastmim.data.draws import permutation

SIZE = (32, 32)


def batches(cfg, steps, batch_size=10, seed=0, **options):
    with create_loader(create_source(cfg), cfg, SIZE, batch_size, seed, **options) as loader:
        return [next(loader) for _ in range(steps)]


def assert_same(a, b):
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.indices, b.indices)
    assert (a.labels is None and b.labels is None) or torch.equal(a.labels, b.labels)
    assert a.replaced == b.replaced


@pytest.fixture
def cfg(class_folder):
    return DataConfig(root=class_folder, workers=0)


def test_a_batch_is_what_it_says(cfg):
    batch = batches(cfg, 1)[0]
    assert batch.images.shape == (10, 3, *SIZE)
    assert batch.images.dtype == torch.float32
    assert batch.labels.shape == batch.indices.shape == (10,)
    assert batch.labels.dtype == batch.indices.dtype == torch.int64
    assert batch.replaced == 0


def test_labels_belong_to_indices(cfg):
    source = create_source(cfg)
    for batch in batches(cfg, 4):
        assert batch.labels.tolist() == [source.label(index) for index in batch.indices.tolist()]


def test_a_flat_folder_has_no_labels(jpeg_folder):
    assert batches(DataConfig(root=jpeg_folder, workers=0), 1)[0].labels is None


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_change_nothing(class_folder, cfg, workers):
    with_workers = DataConfig(root=class_folder, workers=workers, prefetch=2)
    for a, b in zip(batches(cfg, 8), batches(with_workers, 8), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_either_way_of_starting_workers_gives_the_same(class_folder, cfg, monkeypatch, start_method):
    """With CUDA running, workers are not forked; they must then be able to receive all that they need."""
    monkeypatch.setattr("fastmim.data.workers._start_method", lambda: start_method)
    with_workers = DataConfig(root=class_folder, workers=1, prefetch=2)
    for a, b in zip(batches(cfg, 2), batches(with_workers, 2), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("workers", [0, 2])
def test_to_start_at_a_step_is_to_have_come_there(class_folder, workers):
    cfg = DataConfig(root=class_folder, workers=workers)
    straight = batches(cfg, 9)
    for start in (1, 5):
        for a, b in zip(straight[start:], batches(cfg, 9 - start, start_step=start), strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("workers", [0, 1])
def test_state_is_json_and_counts_only_what_was_given(class_folder, workers):
    cfg = DataConfig(root=class_folder, workers=workers)
    source = create_source(cfg)
    with TrainLoader(source, cfg, SIZE, 10, 0) as loader:
        for _ in range(3):
            next(loader)
        state = json.loads(json.dumps(loader.state()))
        expected = next(loader)
    assert state["step"] == 3
    with TrainLoader(source, cfg, SIZE, 10, 0) as loader:
        next(loader)  # a loader already at work may be moved, too
        loader.load_state(state)
        assert_same(next(loader), expected)
        assert loader.step == 4


def test_a_folder_that_changed_since_the_run_was_saved_is_mentioned(cfg, jpeg_folder, caplog):
    state = TrainLoader(create_source(cfg), cfg, SIZE, 10, 0).state()
    flat = DataConfig(root=jpeg_folder, workers=0)
    with TrainLoader(create_source(flat), flat, SIZE, 10, 0) as loader:
        loader.load_state(state)
        next(loader)
    assert "has 24 images, but had 36" in caplog.text


@pytest.mark.parametrize("world_size", [2, 5])
def test_processes_share_the_same_global_batch(cfg, world_size):
    whole = batches(cfg, 3)
    parts = [batches(cfg, 3, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(3):
        assert torch.equal(torch.cat([part[step].images for part in parts]), whole[step].images)
        assert torch.equal(torch.cat([part[step].indices for part in parts]), whole[step].indices)


def test_every_image_comes_once_in_a_pass_in_the_order_of_seed_and_pass(cfg):
    indices = torch.cat([batch.indices for batch in batches(cfg, 18, batch_size=4, seed=9)])
    assert indices.tolist() == [*permutation(9, 0, 36).tolist(), *permutation(9, 1, 36).tolist()]


def test_another_seed_gives_another_run(cfg):
    assert not torch.equal(batches(cfg, 1)[0].images, batches(cfg, 1, seed=1)[0].images)


def test_a_source_smaller_than_a_batch_comes_round_again_with_other_crops(jpeg_folder):
    cfg = DataConfig(root=jpeg_folder, workers=2)
    source = create_source(cfg)
    with TrainLoader(source, cfg, SIZE, 60, 0) as loader:
        assert loader.steps_per_epoch == 1
        batch = next(loader)
    assert torch.bincount(batch.indices).tolist().count(2) + torch.bincount(batch.indices).tolist().count(3) == 24
    image = int(batch.indices[0])
    first, second = torch.nonzero(batch.indices == image).flatten()[:2]
    assert not torch.equal(batch.images[first], batch.images[second])


def test_steps_per_epoch_is_whole_batches(cfg):
    assert TrainLoader(create_source(cfg), cfg, SIZE, 10, 0).steps_per_epoch == 3


def test_uint8_is_what_float32_was_made_from(cfg, class_folder):
    raw = batches(DataConfig(root=class_folder, workers=0, output="uint8"), 2)
    source = create_source(cfg)
    for a, b in zip(raw, batches(cfg, 2), strict=True):
        assert a.images.dtype == torch.uint8
        assert torch.equal(normalise(a.images, source.mean, source.std), b.images)


@pytest.mark.parametrize("output", ["uint8", "float32"])
def test_a_batch_stays_as_it_was_given(class_folder, output):
    """The memory that workers fill is used again; what was handed out must not change with it."""
    cfg = DataConfig(root=class_folder, workers=1, prefetch=1, output=output)
    with TrainLoader(create_source(cfg), cfg, SIZE, 6, 0) as loader:
        first = next(loader)
        copy = first.images.clone()
        for _ in range(3):
            next(loader)
        assert torch.equal(first.images, copy)


def test_digits_need_no_workers_and_are_normalised():
    cfg = DataConfig()
    source = create_source(cfg)
    with TrainLoader(source, cfg, SIZE, 256, 0) as loader:
        assert loader.workers == 0
        images = next(loader).images
    assert images.shape == (256, 1, *SIZE)
    assert abs(images.mean()) < 0.2
    assert 0.7 < images.std() < 1.2


def test_auto_workers_share_the_cpus_among_local_processes(jpeg_folder, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    cfg = DataConfig(root=jpeg_folder)
    source = create_source(cfg)
    assert TrainLoader(source, cfg, SIZE, 8, 0).workers == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert TrainLoader(source, cfg, SIZE, 8, 0).workers == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert TrainLoader(source, cfg, SIZE, 8, 0).workers == 1


@pytest.mark.parametrize("batch_size, world_size", [(0, 1), (10, 3)])
def test_a_batch_that_cannot_be_shared_is_refused(cfg, batch_size, world_size):
    with pytest.raises(DataError, match=f"positive multiple of the {world_size} process"):
        TrainLoader(create_source(cfg), cfg, SIZE, batch_size, 0, world_size=world_size)
