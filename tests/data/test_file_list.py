"""A text file of image paths as a source."""

import os

import numpy as np
import pytest
from PIL import Image

from fastmim.data import DataConfig, DataError, create_source
from fastmim.data.verify import main as verify


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(tmp_path / "images" / f"photo {number}.png")
    return tmp_path


def listed(folder, *lines, name="all.txt", ending=b"\n"):
    (folder / name).write_bytes(ending.join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return DataConfig(root=folder / name)


def red(source, index):
    return np.asarray(source.load(index))[0, 0, 0]


@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b"\n\n"])
def test_images_come_in_the_order_of_the_lines(folder, ending):
    source = create_source(
        listed(
            folder, "images/photo 2.png", "images/photo 0.png", folder.as_posix() + "/images/photo 3.png", ending=ending
        )
    )
    assert [red(source, i) for i in range(3)] == [120, 0, 180]
    assert source.labels is None
    assert source.path(0) == str(folder / "images" / "photo 2.png")


def test_numbers_at_the_end_of_all_lines_are_labels(folder):
    source = create_source(listed(folder, *(f"images/photo {i}.png {label}" for i, label in enumerate([7, 3, 7, 10]))))
    assert source.classes == ["3", "7", "10"]
    assert source.labels.tolist() == [1, 0, 1, 2]


def test_one_line_without_a_number_and_there_are_no_labels(folder):
    names = ["images/photo 0.png", "images/photo 1.png 3"]
    os.rename(folder / "images" / "photo 1.png", folder / "images" / "photo 1.png 3")
    source = create_source(listed(folder, *names, name="all.lst"))
    assert source.labels is None
    assert red(source, 1) == 60


def test_names_of_any_bytes(folder):
    os.rename(folder / "images" / "photo 1.png", os.path.join(os.fsencode(folder), b"images/\xff.png"))
    assert red(create_source(listed(folder, b"images/\xff.png")), 0) == 60


def test_verify_writes_a_list_that_training_heeds(folder, capsys):
    (folder / "images" / "photo 1.png").write_bytes(b"no image")
    cfg = listed(folder, *(f"images/photo {i}.png {i % 2}" for i in range(4)))
    assert verify([str(cfg.root), "--workers", "1"]) == 3
    assert "photo 1.png" in capsys.readouterr().out
    source = create_source(cfg)
    assert [red(source, i) for i in range(3)] == [0, 120, 180]
    assert source.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "lines, sentence",
    [
        ((), "names no images"),
        (("", "  "), "names no images"),
        (("elsewhere/a.png", "elsewhere/b.png"), "none exists; the first is .*elsewhere/a.png"),
    ],
)
def test_a_list_of_nothing_is_answered(folder, lines, sentence):
    with pytest.raises(DataError, match=sentence):
        create_source(listed(folder, *lines))


def test_a_file_that_is_no_list_is_answered(folder):
    (folder / "photos.pdf").write_text("a")
    with pytest.raises(DataError, match=r"nor a .txt list"):
        create_source(DataConfig(root=folder / "photos.pdf"))
