import numpy as np
import pytest
import torch

from fastmim.data import DataConfig, DataError, TrainLoader, ViewSpec, create_source
from fastmim.data.pipeline import TrainRow

VIEWS = (
    ViewSpec("images", (32, 32)),
    ViewSpec("small", (16, 16), crop="images"),
    ViewSpec("local", (24, 16), scale=(0.05, 0.2)),
)


@pytest.fixture
def cfg(class_folder):
    return DataConfig(root=class_folder, workers=0, output="uint8")


def first(cfg, views, **options):
    with TrainLoader(create_source(cfg), cfg, (32, 32), 6, 0, views=views, **options) as loader:
        return next(loader)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("output, dtype", [("uint8", torch.uint8), ("float32", torch.float32)])
def test_every_view_has_its_size_and_the_first_is_what_it_is_alone(class_folder, workers, output, dtype):
    cfg = DataConfig(root=class_folder, workers=workers, output=output)
    batch, alone = first(cfg, VIEWS), first(cfg, ())
    assert torch.equal(batch.images, alone.images)
    assert alone.views == {}
    assert {name: tuple(view.shape) for name, view in batch.views.items()} == {
        "small": (6, 3, 16, 16),
        "local": (6, 3, 24, 16),
    }
    assert all(view.dtype == dtype for view in batch.views.values())


def test_a_shared_crop_shows_the_same_part_of_the_image(cfg):
    batch = first(cfg, VIEWS)
    halved = torch.nn.functional.avg_pool2d(batch.images.float(), 2)
    assert (halved - batch.views["small"].float()).abs().mean() < 6
    other = first(cfg, (VIEWS[0], ViewSpec("small", (16, 16))))
    assert (halved - other.views["small"].float()).abs().mean() > 12


def test_views_of_their_own_crop_differ_and_keep_their_scale(cfg):
    views = (ViewSpec("a", (32, 32)), ViewSpec("b", (32, 32)), ViewSpec("tiny", (8, 8), scale=(0.05, 0.1)))
    row = TrainRow(create_source(cfg), cfg, (32, 32), 0, views)
    for index in range(20):
        (a, _), (b, _), (tiny, _) = row.draw((160, 120), 0, index)
        assert a != b
        assert 0.04 < tiny.width * tiny.height / (160 * 120) < 0.11


def test_one_decode_serves_all_views(cfg, monkeypatch):
    source = create_source(cfg)
    opened = []
    monkeypatch.setattr(source, "open", lambda index, open=source.open: opened.append(index) or open(index))
    row = TrainRow(source, cfg, (32, 32), 0, VIEWS)
    row(np.zeros(3 * (32 * 32 + 16 * 16 + 24 * 16), dtype=np.uint8), 0, 4)
    assert opened == [4]


@pytest.mark.parametrize(
    "views, words",
    [
        ((ViewSpec("a", (32, 32)), ViewSpec("a", (16, 16))), "given twice"),
        ((ViewSpec("a", (32, 32)), ViewSpec("b", (16, 16), crop="c")), "no earlier view"),
        ((ViewSpec("a", (16, 16)),), "img_size"),
        ((ViewSpec("a", (32, 32), scale=(0.5, 2.0)),), "scale"),
        ((ViewSpec("a", (32, 32)), ViewSpec("b", (16, 16), scale=(0.1, 0.2), crop="a")), "no scale of its own"),
    ],
)
def test_impossible_views_are_refused(cfg, views, words):
    with pytest.raises(DataError, match=words):
        first(cfg, views)
