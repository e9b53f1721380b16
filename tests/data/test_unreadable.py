import logging

import pytest
import torch

from fastmim.data import BadDataError, DataConfig, TrainLoader, create_source, eval_batches

SIZE = (32, 32)


def loader_for(root, batch_size=8, start_step=0, **settings):
    cfg = DataConfig(root=root, **settings)
    return TrainLoader(create_source(cfg), cfg, SIZE, batch_size, seed=0, start_step=start_step)


def run(loader, steps):
    with loader:
        return [next(loader) for _ in range(steps)]


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_replaced_counted_and_logged_once(with_files, damaged, caplog, workers):
    root = with_files(damaged)
    loader = loader_for(root, workers=workers)
    names = {index: loader.source.path(index).rsplit("/", 1)[1] for index in range(len(loader.source))}
    with caplog.at_level(logging.WARNING, "fastmim.data"):
        batches = run(loader, 12)  # 96 images: three passes over 31, at least
    lines = [record.getMessage() for record in caplog.records if record.name == "fastmim.data"]
    for name in damaged:
        assert sum(f"/{name} (" in line for line in lines) == 1, name
    assert len(lines) == len(damaged)
    for batch in batches:
        assert not {names[index] for index in batch.indices.tolist()} & set(damaged)
        assert torch.isfinite(batch.images).all()
    assert 3 * len(damaged) <= batches[-1].replaced <= 4 * len(damaged)
    assert [batch.replaced for batch in batches] == sorted(batch.replaced for batch in batches)


def test_replacement_is_the_same_whatever_the_workers_and_after_a_resume(with_files, damaged):
    root = with_files(damaged)
    straight = run(loader_for(root, workers=0), 8)
    for workers, start in ((2, 0), (1, 3)):
        loader = loader_for(root, workers=workers)
        if start:
            before = loader_for(root, workers=0)
            run(before, start)
            loader.load_state(before.state())
        for a, b in zip(straight[start:], run(loader, 8 - start), strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.indices, b.indices)
            assert a.replaced == b.replaced


def test_a_resumed_run_reports_no_file_again(with_files, damaged, caplog):
    root = with_files(damaged)
    loader = loader_for(root, workers=0)
    run(loader, 8)
    caplog.clear()
    resumed = loader_for(root, workers=0)
    resumed.load_state(loader.state())
    run(resumed, 8)
    assert not caplog.records


@pytest.mark.parametrize("workers", [0, 1])
def test_over_budget_the_run_stops_and_says_what_to_do(with_files, workers):
    root = with_files({f"bad_{number}.jpg": b"<html>" for number in range(6)}, good=10)
    loader = loader_for(root, workers=workers, bad_budget=5)
    with pytest.raises(BadDataError) as failure:
        run(loader, 10)
    message = str(failure.value)
    assert failure.value.code == 3
    assert "6 of 16 images could not be read, more than the 5 allowed" in message
    assert message.count(".jpg (UnidentifiedImageError") == 3
    assert "--data.bad_budget" in message


def test_the_default_budget_is_twenty_files_or_one_in_a_hundred(with_files):
    root = with_files({f"bad_{number:02d}.jpg": b"" for number in range(20)}, good=10)
    run(loader_for(root, workers=0), 12)  # 20 are allowed
    (root / "bad_20.jpg").write_bytes(b"")
    with pytest.raises(BadDataError, match="21 of 31 images"):
        run(loader_for(root, workers=0), 12)


def test_a_budget_of_none_stops_at_the_first(with_files):
    root = with_files({"bad.jpg": b""}, good=3)
    with pytest.raises(BadDataError, match="1 image could not be read, more than the 0 allowed"):
        run(loader_for(root, workers=0, bad_budget=0), 1)


def test_a_folder_of_nothing_but_damaged_images_ends(with_files):
    root = with_files({f"bad_{number}.jpg": b"" for number in range(3)}, good=0)
    with pytest.raises(BadDataError, match="3 of 3 images could not be read, 100 tries in a row"):
        run(loader_for(root, workers=0), 1)


def test_a_file_deleted_while_training_is_replaced(with_files, caplog):
    root = with_files({})
    loader = loader_for(root, workers=1, prefetch=1)
    with loader:
        next(loader)
        victim = loader.source.path(0)
        (root / victim).unlink()
        replaced = [next(loader).replaced for _ in range(12)][-1]
    assert replaced >= 3
    assert "FileNotFoundError" in caplog.text


def test_names_that_are_not_utf8_can_be_logged(with_files, tmp_path, caplog):
    root = with_files({})
    with open(str(root).encode() + b"/caf\xe9.jpg", "wb"):
        pass
    run(loader_for(root, workers=1), 4)
    assert "caf\\xe9.jpg (UnidentifiedImageError" in caplog.text
    caplog.text.encode()


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_damaged_images_out(with_files, damaged, caplog, workers):
    root = with_files(damaged)
    cfg = DataConfig(root=root, workers=workers)
    source = create_source(cfg)
    images = torch.cat([images for images, _ in eval_batches(source, cfg, SIZE, 8)])
    assert len(images) == len(source) - len(damaged) == 24
    assert all(caplog.text.count(f"/{name} (") == 1 for name in damaged)


def test_evaluation_has_the_same_budget(with_files):
    root = with_files({f"bad_{number}.jpg": b"" for number in range(4)})
    cfg = DataConfig(root=root, bad_budget=3)
    with pytest.raises(BadDataError):
        list(eval_batches(create_source(cfg), cfg, SIZE, 8))
