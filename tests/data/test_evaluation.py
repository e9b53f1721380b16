import numpy as np
import pytest
import torch

from fastmim.data import DataConfig, create_source, eval_batches, split

SIZE = (24, 24)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_once_in_order(class_folder, workers):
    cfg = DataConfig(root=class_folder, workers=workers)
    source = create_source(cfg)
    batches = list(eval_batches(source, cfg, SIZE, 10))
    assert [len(images) for images, _ in batches] == [10, 10, 10, 6]
    assert torch.cat([labels for _, labels in batches]).tolist() == source.labels.tolist()
    assert batches[0][0].dtype == torch.float32


def test_workers_change_nothing():
    plain, many = DataConfig(workers=0, output="uint8"), DataConfig(workers=2, output="uint8")
    source = create_source(plain)
    chosen = range(100, 400)
    for a, b in zip(
        eval_batches(source, plain, SIZE, 64, chosen), eval_batches(source, many, SIZE, 64, chosen), strict=True
    ):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_chosen_images_in_the_order_given(class_folder):
    cfg = DataConfig(root=class_folder, workers=0)
    source = create_source(cfg)
    everything = torch.cat([images for images, _ in eval_batches(source, cfg, SIZE, 36)])
    chosen = [35, 0, 7]
    [(images, labels)] = eval_batches(source, cfg, SIZE, 8, chosen)
    assert torch.equal(images, everything[chosen])
    assert labels.tolist() == source.labels[chosen].tolist()


def test_no_images_and_no_labels(jpeg_folder):
    cfg = DataConfig(root=jpeg_folder)
    source = create_source(cfg)
    assert list(eval_batches(source, cfg, SIZE, 8, [])) == []
    assert next(eval_batches(source, cfg, SIZE, 8))[1] is None


def test_a_reader_that_stops_early_leaves_no_worker(class_folder):
    import multiprocessing

    cfg = DataConfig(root=class_folder, workers=2)
    source = create_source(cfg)
    batches = eval_batches(source, cfg, SIZE, 2, [0, 1, 2] * 100)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


class TestSplit:
    def test_is_stratified_disjoint_and_complete(self):
        source = create_source(DataConfig())
        train, test = split(source, seed=0, fraction=0.2)
        assert sorted([*train, *test]) == list(range(1797))
        shares = np.bincount(source.labels[test]) / np.bincount(source.labels)
        assert np.abs(shares - 0.2).max() < 0.01

    def test_depends_on_the_seed_only(self):
        source = create_source(DataConfig())
        assert np.array_equal(split(source, 3, 0.2)[1], split(source, 3, 0.2)[1])
        assert not np.array_equal(split(source, 3, 0.2)[1], split(source, 4, 0.2)[1])

    def test_keeps_some_of_every_class_on_both_sides(self, class_folder):
        source = create_source(DataConfig(root=class_folder))
        for fraction in (0.001, 0.5, 0.999):
            train, test = split(source, 0, fraction)
            assert set(source.labels[train]) == set(source.labels[test]) == {0, 1, 2}

    def test_without_labels_all_images_are_one_class(self, jpeg_folder):
        train, test = split(create_source(DataConfig(root=jpeg_folder)), 0, 0.25)
        assert (len(train), len(test)) == (18, 6)

    @pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
    def test_fraction_between_0_and_1(self, fraction):
        with pytest.raises(ValueError, match="between 0 and 1"):
            split(create_source(DataConfig()), 0, fraction)
