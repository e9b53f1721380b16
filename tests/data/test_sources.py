import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from fastmim.data import DataConfig, DataError, create_source, digits, held_out_source
from fastmim.data.errors import printable


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path, format="PNG")


def relative(source, root):
    return [os.path.relpath(source.path(index), root) for index in range(len(source))]


class TestDigits:
    def test_are_the_default(self):
        source = create_source(DataConfig())
        assert (source.name, len(source), source.in_chans, source.in_memory) == ("digits", 1797, 1, True)
        assert source.classes == [str(digit) for digit in range(10)]
        assert [source.label(index) for index in range(5)] == [0, 1, 2, 3, 4]

    def test_use_all_of_eight_bits(self):
        source = create_source(DataConfig())
        image = source.load(0)
        assert (image.mode, image.size) == ("L", (8, 8))
        assert source.images.min() == 0
        assert source.images.max() == 255

    def test_their_own_mean_and_std_are_right(self):
        source = create_source(DataConfig())
        values = source.images / 255
        assert source.mean == pytest.approx((values.mean(),), abs=2e-4)
        assert source.std == pytest.approx((values.std(),), abs=2e-4)

    def test_are_those_of_scikit_learn(self, monkeypatch):
        from sklearn.datasets import load_digits

        theirs = load_digits()
        source = create_source(DataConfig())
        assert (source.images == np.rint(theirs.images * (255 / 16))).all()
        assert (source.labels == theirs.target).all()
        monkeypatch.setattr(digits.Path, "is_file", lambda path: False)
        again = create_source(DataConfig())
        assert (again.images == source.images).all()
        assert (again.labels == source.labels).all()

    def test_are_never_mirrored_unless_asked(self):
        assert create_source(DataConfig()).flip is False
        assert create_source(DataConfig(flip=True)).flip is True

    def test_may_be_read_in_colour(self):
        source = create_source(DataConfig(in_chans=3))
        assert source.load(0).mode == "RGB"
        assert len(source.mean) == len(source.std) == 3

    def test_name_what_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn", None)
        with pytest.raises(DataError, match=r"pip install scikit-learn, or .* --data.root DIR"):
            create_source(DataConfig())


class TestFolder:
    def test_flat(self, jpeg_folder):
        source = create_source(DataConfig(root=jpeg_folder))
        assert len(source) == 24
        assert source.classes is None
        assert source.label(0) is None
        assert relative(source, jpeg_folder) == sorted(os.listdir(jpeg_folder))
        assert source.load(0).mode == "RGB"

    def test_classes(self, class_folder):
        source = create_source(DataConfig(root=class_folder))
        assert source.classes == ["chelsea", "coffee", "flower"]
        assert np.bincount(source.labels).tolist() == [12, 12, 12]
        assert all(source.classes[source.label(index)] in source.path(index) for index in range(36))

    def test_classes_are_first_level_folders_with_images(self, tmp_path):
        touch(tmp_path, "b/deep/er/1.png", "a/2.png", "a/x/3.png")
        (tmp_path / "empty").mkdir()
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "readme.txt").write_text("no image")
        source = create_source(DataConfig(root=tmp_path))
        assert source.classes == ["a", "b"]
        assert relative(source, tmp_path) == ["a/2.png", "a/x/3.png", "b/deep/er/1.png"]
        assert source.labels.tolist() == [0, 0, 1]

    @pytest.mark.parametrize("names", [("only/1.png", "only/sub/2.png"), ("1.png", "a/2.png", "b/3.png")])
    def test_one_folder_or_images_beside_folders_are_no_classes(self, tmp_path, names):
        touch(tmp_path, *names)
        source = create_source(DataConfig(root=tmp_path))
        assert source.classes is None
        assert len(source) == len(names)

    def test_known_extensions_in_any_case(self, tmp_path):
        touch(tmp_path, "a.JPG", "b.jpeg", "c.Png", "d.webp", "e.BMP", "f.tif", "g.TIFF", "h.gif", "i.txt", "jpg")
        touch(tmp_path, "._a.JPG", ".hidden.png", ".cache/k.png")
        source = create_source(DataConfig(root=tmp_path))
        assert len(source) == 7

    def test_names_of_any_bytes(self, tmp_path, caplog):
        touch(tmp_path, "with space.png", "línea\nbreak.png")
        odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
        shutil.copy(tmp_path / "with space.png", odd)
        source = create_source(DataConfig(root=tmp_path))
        assert len(source) == 3
        assert all(source.load(index).size == (4, 4) for index in range(3))
        assert odd in [source.path(index) for index in range(3)]
        assert printable(odd).endswith("caf\\xe9.png")
        printable(odd).encode()

    def test_link_loops_end(self, tmp_path):
        touch(tmp_path, "a/1.png", "b/2.png")
        (tmp_path / "a" / "up").symlink_to(tmp_path)
        (tmp_path / "b" / "other").symlink_to(tmp_path / "a")
        (tmp_path / "a" / "self.png").symlink_to(tmp_path / "a" / "self.png")
        (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
        (tmp_path / "b" / "linked.png").symlink_to(tmp_path / "a" / "1.png")
        source = create_source(DataConfig(root=tmp_path))
        assert relative(source, tmp_path) == ["a/1.png", "b/2.png", "b/linked.png"]

    def test_the_order_does_not_depend_on_the_file_system(self, tmp_path, monkeypatch):
        touch(tmp_path, *(f"{folder}/{number}.png" for folder in "cab" for number in (3, 1, 2)))
        first = relative(create_source(DataConfig(root=tmp_path)), tmp_path)
        listed = os.scandir

        class Backwards:
            def __init__(self, path):
                with listed(path) as entries:
                    self.entries = list(entries)[::-1]

            def __enter__(self):
                return iter(self.entries)

            def __exit__(self, *_):
                pass

        monkeypatch.setattr(os, "scandir", Backwards)
        assert relative(create_source(DataConfig(root=tmp_path)), tmp_path) == first

    def test_listing_a_very_large_folder_shows_how_far_it_is(self, class_folder, monkeypatch, caplog):
        create_source(DataConfig(root=class_folder))
        assert not caplog.records
        monkeypatch.setattr("fastmim.data.listing._HINT_SECONDS", -1.0)
        with caplog.at_level("INFO", "fastmim.data"):
            create_source(DataConfig(root=class_folder))
        assert "36 files so far" in caplog.text

    def test_grey_on_request(self, jpeg_folder):
        source = create_source(DataConfig(root=jpeg_folder, in_chans=1))
        assert source.load(0).mode == "L"
        assert source.mean == pytest.approx((0.4588,), abs=1e-3)
        assert len(source.std) == 1

    def test_own_mean_and_std(self, jpeg_folder):
        source = create_source(DataConfig(root=jpeg_folder, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0)))
        assert (source.mean, source.std) == ((0.5,) * 3, (1.0,) * 3)

    def test_a_file_beyond_reason_is_not_read(self, tmp_path):
        with open(tmp_path / "huge.bmp", "wb") as file:
            file.truncate(2_000_000_000)
        source = create_source(DataConfig(root=tmp_path))
        with pytest.raises(ValueError, match="2,000,000,000 bytes"):
            source.load(0)


class TestHeldOut:
    def test_train_beside_val(self, tmp_path):
        touch(tmp_path, "train/a/1.png", "train/b/2.png", "train/c/3.png", "val/c/4.png", "val/a/5.png")
        cfg = DataConfig(root=tmp_path)
        assert relative(create_source(cfg), tmp_path) == ["train/a/1.png", "train/b/2.png", "train/c/3.png"]
        held_out = held_out_source(cfg)
        assert held_out.classes == ["a", "b", "c"]
        assert held_out.labels.tolist() == [0, 2]

    def test_none(self, class_folder):
        assert held_out_source(DataConfig(root=class_folder)) is None
        assert held_out_source(DataConfig()) is None

    def test_classes_unknown_to_training_are_refused(self, tmp_path):
        touch(tmp_path, "train/a/1.png", "train/b/2.png", "test/a/3.png", "test/zebra/4.png")
        with pytest.raises(DataError, match="zebra"):
            held_out_source(DataConfig(root=tmp_path))


class TestRefusals:
    def test_missing(self, tmp_path):
        with pytest.raises(DataError, match="nowhere does not exist"):
            create_source(DataConfig(root=tmp_path / "nowhere"))

    def test_a_file(self, tmp_path):
        touch(tmp_path, "1.png")
        with pytest.raises(DataError, match=r"1.png is a file, not a folder"):
            create_source(DataConfig(root=tmp_path / "1.png"))

    def test_empty_or_without_images(self, tmp_path):
        with pytest.raises(DataError, match="no images under"):
            create_source(DataConfig(root=tmp_path))
        (tmp_path / "notes.txt").write_text("nothing to see")
        with pytest.raises(DataError, match=r"no images under .*\.jpg, \.jpeg"):
            create_source(DataConfig(root=tmp_path))

    @pytest.mark.parametrize(
        "settings, words",
        [
            ({"source": "folder"}, "data.root is not given"),
            ({"source": "digits", "root": "x"}, "drop one of the two"),
            ({"scale": (0.5, 0.2)}, "data.scale"),
            ({"scale": (0.2, 1.5)}, "data.scale"),
            ({"ratio": (0.0, 1.0)}, "data.ratio"),
            ({"in_chans": 4}, "data.in_chans"),
            ({"workers": -1}, "data.workers"),
            ({"prefetch": 0}, "data.prefetch"),
            ({"max_pixels": 0}, "data.max_pixels"),
            ({"bad_budget": -1}, "data.bad_budget"),
            ({"std": (0.0,)}, "data.std"),
            ({"mean": (0.1, 0.2, 0.3)}, "data.mean has 3 numbers, but images are read with 1 channel"),
        ],
    )
    def test_impossible_settings_name_their_key(self, settings, words):
        with pytest.raises(DataError, match=words):
            create_source(DataConfig(**settings))

    def test_data_errors_are_value_errors(self):
        assert issubclass(DataError, ValueError)
