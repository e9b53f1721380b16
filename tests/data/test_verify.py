import subprocess
import sys

import pytest

from fastmim.data import DataConfig, DataError, create_loader, create_source, held_out_source
from fastmim.data.exclusion import EXCLUDE
from fastmim.data.verify import main
from tests.data.write_shards import samples_of, write_tar, write_tfrecord


def names(source):
    return [source.name_of(index).decode() for index in range(len(source))]


def test_finds_every_damaged_file_and_training_leaves_them_out(with_files, damaged, capsys):
    folder = with_files(damaged)
    assert main([str(folder), "--workers", "2"]) == 3
    out = capsys.readouterr().out
    assert f"31 images, {len(damaged)} unreadable" in out
    assert all(name in out for name in damaged)
    assert sorted((folder / EXCLUDE).read_text().split()) == sorted(damaged)

    cfg = DataConfig(root=folder, workers=0, bad_budget=0)
    source = create_source(cfg)
    assert len(source) == 24
    assert not set(names(source)) & set(damaged)
    with create_loader(source, cfg, (32, 32), 24, 0) as loader:
        assert next(loader).replaced == 0


def test_a_good_folder_ends_with_0_and_leaves_nothing_behind(with_files, capsys):
    folder = with_files({}, good=4)
    assert main([str(folder), "--workers", "1"]) == 0
    assert "4 images, 0 unreadable" in capsys.readouterr().out
    assert not (folder / EXCLUDE).exists()


def test_the_list_may_lie_elsewhere(with_files, damaged, tmp_path):
    folder = with_files({"empty.jpg": damaged["empty.jpg"]}, good=4)
    assert main([str(folder), "--workers", "1", "--out", str(tmp_path / "bad.txt")]) == 3
    assert len(create_source(DataConfig(root=folder))) == 5
    assert len(create_source(DataConfig(root=folder, exclude=tmp_path / "bad.txt"))) == 4
    with pytest.raises(DataError, match=r"data\.exclude"):
        create_source(DataConfig(root=folder, exclude=tmp_path / "missing.txt"))


def test_what_was_excluded_is_looked_at_again(with_files, damaged):
    folder = with_files({"empty.jpg": damaged["empty.jpg"]}, good=4)
    assert main([str(folder), "--workers", "1"]) == 3
    good = next(path for path in folder.iterdir() if path.suffix == ".jpg" and path.stat().st_size)
    (folder / "empty.jpg").write_bytes(good.read_bytes())
    assert main([str(folder), "--workers", "1"]) == 0
    assert (folder / EXCLUDE).read_bytes() == b""
    assert len(create_source(DataConfig(root=folder))) == 5


def test_the_command_explains_itself_and_its_errors(tmp_path):
    def run(*words):
        return subprocess.run([sys.executable, "-m", "fastmim.data.verify", *words], capture_output=True, text=True)

    assert "--out" in run("--help").stdout
    missing = run(str(tmp_path / "nowhere"))
    assert missing.returncode == 2
    assert "does not exist" in missing.stderr


@pytest.mark.parametrize("write", [write_tar, write_tfrecord])
def test_shards(class_folder, damaged, tmp_path, capsys, write):
    samples = samples_of(class_folder, 6)
    bad = [(name.replace(".", "_"), content, 10) for name, content in damaged.items()]
    ending = "tar" if write is write_tar else "tfrecord"
    write(tmp_path / f"a.{ending}", [samples[0], *bad[:3], *samples[1:3]])
    write(tmp_path / "sub" / f"b.{ending}", [*bad[3:], *samples[3:]])
    assert main([str(tmp_path), "--workers", "2"]) == 3
    out = capsys.readouterr().out
    assert f"{6 + len(bad)} images, {len(bad)} unreadable" in out
    listed = (tmp_path / EXCLUDE).read_text().splitlines()
    assert len(listed) == len(bad)
    assert all(name.startswith((f"a.{ending}/", f"sub/b.{ending}/")) for name in listed)

    cfg = DataConfig(root=tmp_path, workers=0, bad_budget=0)
    source = create_source(cfg)
    assert [source.encoded(number) for number in range(len(source))] == [image for _, image, _ in samples]
    assert [source.classes[label] for label in source.labels] == [str(label) for _, _, label in samples]
    with create_loader(source, cfg, (32, 32), 6, 0) as loader:
        assert next(loader).replaced == 0

    assert main([str(tmp_path / f"a.{ending}"), "--workers", "1", "--out", "-"]) == 3
    (tmp_path / f"a.{ending}").write_bytes((tmp_path / f"a.{ending}").read_bytes()[:-10_000])
    (tmp_path / "sub" / f"b.{ending}").unlink()
    (tmp_path / EXCLUDE).unlink()
    capsys.readouterr()
    assert main([str(tmp_path), "--workers", "1"]) == 3
    out = capsys.readouterr().out
    assert f"{tmp_path}/a.{ending}: damaged at byte " in out
    assert "1 shards damaged" in out


def test_damaged_shards_alone_end_with_3(class_folder, tmp_path, capsys):
    write_tfrecord(tmp_path / "x.tfrecord", samples_of(class_folder, 3))
    (tmp_path / "x.tfrecord").write_bytes((tmp_path / "x.tfrecord").read_bytes()[:-1])
    assert main([str(tmp_path), "--workers", "1"]) == 3
    assert "2 images, 0 unreadable" in capsys.readouterr().out
    assert not (tmp_path / EXCLUDE).exists()


def test_training_and_held_out_images_are_listed_where_they_are_read(with_files, damaged, tmp_path):
    (tmp_path / "data").mkdir()
    with_files({"empty.jpg": b""}, good=2).rename(tmp_path / "data" / "train")
    with_files({"page.jpg": damaged["page.jpg"]}, good=3).rename(tmp_path / "data" / "val")
    assert main([str(tmp_path / "data"), "--workers", "1"]) == 3
    assert (tmp_path / "data" / "train" / EXCLUDE).read_text() == "empty.jpg\n"
    assert (tmp_path / "data" / "val" / EXCLUDE).read_text() == "page.jpg\n"
    cfg = DataConfig(root=tmp_path / "data")
    assert (len(create_source(cfg)), len(held_out_source(cfg))) == (2, 3)
