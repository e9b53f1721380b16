"""probe: which images train and which test, over which seeds."""

import shutil

import pytest
import torch

from fastmim.data import DataConfig
from fastmim.evaluation import Score, probe
from fastmim.models import create_encoder


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return create_encoder("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2)


def test_each_seed_holds_out_another_fifth(encoder, class_folder):
    scores = probe(encoder, DataConfig(root=class_folder), (32, 32), seeds=(0, 1, 2, 3))
    assert set(scores) == {"knn", "linear"}
    for kind, score in scores.items():
        assert (score.kind, len(score.top1), score.seeds) == (kind, 4, [0, 1, 2, 3])
        assert (score.train_images, score.test_images, score.classes) == (30, 6, 3)
        assert 0 <= score.mean <= 100
    again = probe(encoder, DataConfig(root=class_folder), (32, 32), seeds=(0, 1, 2, 3))
    assert {kind: score.top1 for kind, score in again.items()} == {kind: score.top1 for kind, score in scores.items()}


def test_a_held_out_folder_is_used_where_there_is_one(encoder, class_folder, tmp_path):
    shutil.copytree(class_folder, tmp_path / "train")
    for folder in class_folder.iterdir():
        (tmp_path / "val" / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:4]:
            shutil.copy(image, tmp_path / "val" / folder.name)
    score = probe(encoder, DataConfig(root=tmp_path), (32, 32), ["knn"], options={"k": 1, "temperature": 0.01})["knn"]
    assert (score.top1, score.seeds) == ([100.0], [])  # each test image is in train too: its own nearest neighbour
    assert (score.train_images, score.test_images) == (36, 12)
    assert str(score) == "knn top-1 100.0 % (on the held-out folder)"


def test_unreadable_images_are_left_out(encoder, class_folder, tmp_path):
    folder = shutil.copytree(class_folder, tmp_path / "images")
    next(iter(sorted((folder / "chelsea").iterdir()))).write_bytes(b"no image")
    score = probe(encoder, DataConfig(root=folder), (32, 32), ["knn"], seeds=[0])["knn"]
    assert score.train_images + score.test_images == 35


def test_images_without_labels_are_refused(encoder, jpeg_folder):
    with pytest.raises(ValueError, match=r"has no class folders.*one folder per class"):
        probe(encoder, DataConfig(root=jpeg_folder), (32, 32))


def test_single_images_of_each_class_are_refused(encoder, class_folder, tmp_path):
    for folder in class_folder.iterdir():
        (tmp_path / folder.name).mkdir()
        shutil.copy(next(iter(folder.iterdir())), tmp_path / folder.name)
    with pytest.raises(ValueError, match="has a single image"):
        probe(encoder, DataConfig(root=tmp_path), (32, 32))


def test_how_a_score_reads():
    assert (
        str(Score("linear", [92.7, 93.1, 93.5], [0, 1, 2], 80, 20, 10))
        == "linear top-1 93.1 % (± 0.4 over 3 split seeds)"
    )
    assert str(Score("knn", [50.0], [4], 80, 20, 10)) == "knn top-1 50.0 % (split seed 4)"
    facts = Score("linear", [92.7, 93.1, 93.5], [0, 1, 2], 80, 20, 10).to_dict()
    assert (facts["top1"], facts["spread"], facts["top1_per_seed"]) == (93.1, 0.4, [92.7, 93.1, 93.5])
