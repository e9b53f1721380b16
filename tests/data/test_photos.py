import sys

import numpy as np
import pytest
from PIL import Image

from fastmim.data import DataConfig, create_source
from fastmim.data.photos import main, photographs, regions

pytest.importorskip("skimage")


def test_a_folder_of_photographs_is_written_and_read(tmp_path, capsys):
    assert main([str(tmp_path / "photos")]) == 0
    assert "272 images" in capsys.readouterr().out
    source = create_source(DataConfig(root=tmp_path / "photos"))
    assert len(source) == 272
    assert len(source.classes) == 17
    assert source.classes == list(photographs())
    image = source.load(source.classes.index("china") * 16 + 5)  # row 1, column 1
    assert (image.mode, image.size) == ("RGB", (128, 86))
    assert np.array_equal(np.asarray(image), np.asarray(photographs()["china"])[85:171, 128:256])


def test_regions_hold_every_pixel_once():
    pixels = np.arange(7 * 9, dtype=np.uint8).reshape(7, 9)
    parts = [np.asarray(part) for part in regions(Image.fromarray(pixels))]
    rows = [np.concatenate(parts[4 * row : 4 * row + 4], axis=1) for row in range(4)]
    assert np.array_equal(np.concatenate(rows), pixels)


def test_a_folder_that_cannot_be_written_and_a_missing_package_are_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("no folder")
    assert main([str(tmp_path / "file")]) == 2
    assert "file/astronaut cannot be written" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert main([str(tmp_path / "photos")]) == 2
    assert "skimage is not installed: pip install scikit-image" in capsys.readouterr().err
