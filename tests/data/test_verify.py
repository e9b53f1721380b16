import subprocess
import sys

import pytest

from fastmim.data import DataConfig, DataError, create_loader, create_source
from fastmim.data.exclusion import EXCLUDE
from fastmim.data.verify import main


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
