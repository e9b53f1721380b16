import errno
import os
import random
import shutil
from pathlib import Path

import pytest

from fastmim.data import DataConfig, create_source
from fastmim.data import shard_index as module
from fastmim.data.shard_file import ShardError, ShardFile
from tests.data.write_shards import write_tar, write_tfrecord


@pytest.fixture
def shard(samples, tmp_path):
    write_tar(tmp_path / "data" / "x.tar", samples[:6])
    return tmp_path / "data" / "x.tar"


@pytest.fixture
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches" / "fastmim" / "shards"


@pytest.fixture
def built(monkeypatch):
    """The shards whose headers were read, in order."""
    from fastmim.data.webdataset import WebDatasetSource, index_tar

    names = []

    def index(path, file):
        names.append(Path(os.fsdecode(path)).name)
        return index_tar(file)

    monkeypatch.setattr(WebDatasetSource, "index", staticmethod(index))
    return names


def read(root):
    source = create_source(DataConfig(root=root))
    return [(source.name_of(number), source.encoded(number), source.label(number)) for number in range(len(source))]


def kept(shard):
    return shard.with_name(f".{shard.name}.fastmim-index")


def test_a_shard_is_walked_once(shard, built):
    assert read(shard) == read(shard)
    assert built == ["x.tar"]
    assert oct(kept(shard).stat().st_mode)[-3:] == "644", "others who train on these shards use it too"


def test_a_shard_that_changed_is_walked_again(shard, samples, built):
    read(shard)
    os.utime(shard, ns=(1, 1))
    assert len(read(shard)) == 6
    write_tar(shard, samples[:5])
    assert len(read(shard)) == 5
    assert built == ["x.tar"] * 3


def test_an_index_is_used_where_the_shard_was_moved_with_it(shard, built):
    read(shard)
    moved = shard.parent.rename(shard.parent.parent / "moved")
    assert len(read(moved)) == 6
    assert built == ["x.tar"]


def test_where_the_folder_cannot_be_written_the_cache_folder_is(shard, caches, built, monkeypatch, caplog):
    write = module._write

    def read_only(place, content):
        if place.parent == shard.parent:
            raise OSError(errno.EROFS, "Read-only file system")
        write(place, content)

    monkeypatch.setattr(module, "_write", read_only)
    assert read(shard) == read(shard)
    assert built == ["x.tar"]
    assert len(list(caches.iterdir())) == 1
    assert not kept(shard).exists()
    assert not caplog.records


def test_where_nothing_can_be_written_each_start_walks(shard, built, monkeypatch, caplog):
    def full(place, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    assert read(shard) == read(shard)
    assert built == ["x.tar"] * 2
    assert "x.tar cannot be kept (No space left on device)" in caplog.text


def test_a_failed_write_leaves_nothing_behind(shard, caches, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", fails)
    assert len(read(shard)) == 6
    assert os.listdir(shard.parent) == ["x.tar"]
    assert os.listdir(caches) == []


def test_any_damage_to_an_index_is_seen(shard, caches, built):
    expected = read(shard)
    content = kept(shard).read_bytes()
    rng = random.Random(0)
    flipped = [bytearray(content) for _ in range(40)]
    for copy in flipped:
        copy[rng.randrange(len(copy))] ^= 1 << rng.randrange(8)
    cut = [content[:length] for length in range(0, len(content), 23)]
    for damaged in [*flipped, *cut, content + b"x"]:
        kept(shard).write_bytes(damaged)
        assert read(shard) == expected
    assert len(built) == 1 + len(flipped) + len(cut) + 1


@pytest.mark.parametrize(
    "change",
    [
        {"samples": 10**12},
        {"samples": -1},
        {"samples": 5},
        {"samples": "6"},
        {"size": None},
        {"kind": "tfrecord"},
        {"warnings": 5},
        {"offsets": [10**15] * 6},
        {"offsets": [-1] * 6},
        {"sizes": [2**63 - 1] * 6},
        {"sizes": [-1] * 6},
        {"labels": [-2] * 6},
        {"ends": [5, 4, 3, 2, 1, 0]},
        {"ends": [2**62] * 6},
    ],
)
def test_an_index_of_strangers_is_checked(shard, built, change):
    import json
    import zlib

    import numpy as np

    expected = read(shard)
    start = kept(shard).read_bytes().split(b"\n", 2)
    header, rest = json.loads(start[1]), start[2][:-4]
    columns = {name: rest[48 * number : 48 * number + 48] for number, name in enumerate(["offsets", "sizes", "labels"])}
    columns |= {"ends": rest[144:192], "keys": rest[192:]}
    for name, value in change.items():
        if name in header:
            header[name] = value
        else:
            columns[name] = np.array(value, dtype="<i8").tobytes()
    body = b"\n".join([start[0], json.dumps(header).encode(), b"".join(columns.values())])
    kept(shard).write_bytes(body + zlib.crc32(body).to_bytes(4, "little"))
    assert read(shard) == expected
    assert built == ["x.tar"] * 2


def test_warnings_of_strangers_stay_on_their_line(shard, caplog):
    [index] = module.index_shards([os.fsencode(shard)], "webdataset", lambda _, file: module.Rows(file).index(), "x")
    index.warnings = ["two\nlines \x1b[2J" + "x" * 1500] * 30
    kept(shard).write_bytes(module._encoded(index, "webdataset"))
    again = module._kept(os.fsencode(shard), "webdataset")
    assert again is not None
    assert len(again.warnings) == 20
    assert all(words.startswith("two\\x0alines \\x1b[2J") and len(words) < 2000 for words in again.warnings)


def test_tar_and_tfrecord_of_one_name_do_not_mix(samples, tmp_path):
    write_tfrecord(tmp_path / "x.tfrecord", samples[:3])
    read(tmp_path / "x.tfrecord")
    shutil.copy(kept(tmp_path / "x.tfrecord"), kept(tmp_path / "x.tar"))
    write_tar(tmp_path / "x.tar", samples[:4])
    assert len(read(tmp_path / "x.tar")) == 4


def test_many_shards_show_how_far_it_is(samples, tmp_path, monkeypatch, caplog):
    for number in range(12):
        write_tar(tmp_path / f"{number:02d}.tar", samples[number : number + 1])
    monkeypatch.setattr(module, "_SAY_SECONDS", -1.0)
    with caplog.at_level("INFO", "fastmim.data"):
        assert [label for _, _, label in read(tmp_path)] == [0, 1, 2] * 4
    assert "12 of 12 shards so far" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", "fastmim.data"):
        read(tmp_path)
    assert not caplog.records


def test_processes_share_the_work(samples, tmp_path, monkeypatch, built):
    """Each begins elsewhere and takes what it finds done."""
    for number in range(4):
        write_tar(tmp_path / f"{number}.tar", samples[number : number + 1])
    monkeypatch.setattr(module, "_THREADS", 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    expected = read(tmp_path)
    assert built == ["2.tar", "3.tar", "0.tar", "1.tar"]
    assert [image for _, image, _ in expected] == [image for _, image, _ in samples[:4]]


class TestFile:
    def test_reads_exactly_or_says_where_it_ends(self, tmp_path):
        (tmp_path / "x").write_bytes(bytes(range(100)))
        file = ShardFile(os.fsencode(tmp_path / "x"))
        assert file.read(10, 5) == file.at(10, 5) == bytes(range(10, 15))
        assert file.at(90, 10) == bytes(range(90, 100))
        assert file.at(0, 100) == bytes(range(100))
        for reader in (file.read, file.at):
            with pytest.raises(ShardError, match="cut off: 11 bytes wanted, 10 left at byte 90"):
                reader(90, 11)

    def test_short_reads_are_continued(self, tmp_path, monkeypatch):
        (tmp_path / "x").write_bytes(bytes(range(100)))
        pread = os.pread
        monkeypatch.setattr(os, "pread", lambda fd, count, at: pread(fd, min(count, 7), at))
        assert ShardFile(os.fsencode(tmp_path / "x")).read(3, 90) == bytes(range(3, 93))

    def test_a_file_that_shrank_ends(self, tmp_path):
        (tmp_path / "x").write_bytes(bytes(100))
        file = ShardFile(os.fsencode(tmp_path / "x"))
        os.truncate(tmp_path / "x", 50)
        with pytest.raises(ShardError, match="cut off: 100 bytes wanted, 50 left"):
            file.read(0, 100)

    def test_is_closed_when_nobody_has_it(self, tmp_path):
        (tmp_path / "x").write_bytes(b"x")
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            ShardFile(os.fsencode(tmp_path / "x"))
        assert len(os.listdir("/proc/self/fd")) == before

    def test_a_handle_that_went_stale_is_opened_anew(self, shard, monkeypatch):
        source = create_source(DataConfig(root=shard))
        expected = source.encoded(0)
        fails = [OSError(errno.ESTALE, "Stale file handle")]
        read_bytes = ShardFile.read

        def once(file, offset, count):
            if fails:
                raise fails.pop()
            return read_bytes(file, offset, count)

        monkeypatch.setattr(ShardFile, "read", once)
        assert source.encoded(0) == expected
