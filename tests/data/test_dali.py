import pytest
import torch

from fastmim.data import BadDataError, DataConfig, DataError, ViewSpec, create_loader, create_source
from fastmim.data import dali as dali_module

needs_dali = pytest.mark.skipif(bool(dali_module.why_not()), reason=dali_module.why_not() or "DALI is there")
VIEWS = (ViewSpec("images", (64, 64)), ViewSpec("small", (32, 32), crop="images"), ViewSpec("own", (32, 48)))


def batches(root, pipeline, steps=3, **options):
    cfg = DataConfig(root=root, workers=0, output="uint8", pipeline=pipeline)
    with create_loader(create_source(cfg), cfg, (64, 64), 8, 0, views=VIEWS, **options) as loader:
        return [next(loader) for _ in range(steps)]


@pytest.mark.dali
@needs_dali
def test_differs_from_pillow_by_resampling_only(class_folder):
    for one, two in zip(batches(class_folder, "dali"), batches(class_folder, "pillow"), strict=True):
        assert torch.equal(one.indices, two.indices)
        assert torch.equal(one.labels, two.labels)
        for a, b in ((one.images, two.images), *((one.views[name], two.views[name]) for name in ("small", "own"))):
            distance = (a.float() - b.float()).abs()
            assert distance.flatten(1).mean(1).max() < 0.5
            assert distance.max() < 25


@pytest.mark.dali
@needs_dali
def test_repeats_bitwise_and_starts_anywhere(class_folder):
    straight = batches(class_folder, "dali", 4)
    for a, b in zip(straight[2:], batches(class_folder, "dali", 2, start_step=2), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.views["own"], b.views["own"])


@pytest.mark.dali
@needs_dali
def test_unreadable_images_are_replaced_as_pillow_replaces_them(with_files, damaged):
    folder = with_files(damaged)
    for one, two in zip(batches(folder, "dali", 5), batches(folder, "pillow", 5), strict=True):
        assert torch.equal(one.indices, two.indices)
        assert one.replaced == two.replaced
    assert one.replaced > 0


@pytest.mark.dali
@needs_dali
def test_the_budget_holds(with_files, damaged):
    cfg = DataConfig(root=with_files(damaged, good=8), workers=0, pipeline="dali", bad_budget=2)
    with create_loader(create_source(cfg), cfg, (32, 32), 30, 0) as loader, pytest.raises(BadDataError):
        next(loader)


@pytest.mark.dali
@needs_dali
def test_a_batch_that_dali_refuses_is_made_all_the_same(class_folder, monkeypatch, caplog):
    expected = batches(class_folder, "pillow", 1)[0]

    def refuse(self, fed):
        raise RuntimeError("broken image")

    monkeypatch.setattr(dali_module.DaliRows, "_run", refuse)
    assert torch.equal(batches(class_folder, "dali", 1)[0].images, expected.images)
    assert "broken image" in caplog.text


def test_without_dali_the_error_says_how_to_install_it(class_folder, monkeypatch):
    monkeypatch.setattr(dali_module, "why_not", lambda: f"DALI is not installed: {dali_module.INSTALL}")
    with pytest.raises(DataError, match=r"pip install"):
        batches(class_folder, "dali", 1)
