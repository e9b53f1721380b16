import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from fastmim.data import DataConfig, DataError, TrainLoader, create_loader, create_source, eval_batches, held_out_source
from fastmim.data.shard_file import ShardFile
from fastmim.data.shard_index import NO_LABEL
from fastmim.data.webdataset import index_tar, split_name
from tests.data.write_shards import add, write_tar

SIZE = (32, 32)
PICKLE = b"cos\nsystem\n(S'touch executed'\ntR."  # what a pickle that runs a command looks like


@pytest.fixture
def shards(samples, tmp_path):
    """Three shards of twelve."""
    folder = tmp_path / "shards"
    for number in range(3):
        write_tar(folder / f"train-{number:06d}.tar", samples[12 * number : 12 * number + 12])
    return folder


def indexed(path: Path, idx: bytes | None = None):
    return index_tar(ShardFile(os.fsencode(path)), idx)


def keys(index):
    return [index.key(number).decode() for number in range(len(index))]


def stored(source):
    return [source.encoded(index) for index in range(len(source))]


class TestReading:
    def test_every_image_as_it_is_stored_with_its_label(self, shards, samples):
        source = create_source(DataConfig(root=shards))
        assert len(source) == 36
        assert stored(source) == [image for _, image, _ in samples]
        assert source.classes == ["10", "20", "30"]
        assert [source.classes[label] for label in source.labels] == [str(label) for _, _, label in samples]
        assert source.path(13) == f"{shards}/train-000001.tar/{samples[13][0]}.jpg"
        assert source.load(13).mode == "RGB"
        assert isinstance(source.open(13).fp, io.BytesIO)

    def test_a_batch_is_that_of_the_same_files_in_a_folder(self, shards, samples, tmp_path):
        for number, (_, image, _) in enumerate(samples):
            (tmp_path / "files").mkdir(exist_ok=True)
            (tmp_path / "files" / f"{number:03d}.jpg").write_bytes(image)
        batches = []
        for root, workers in ((shards, 0), (shards, 2), (tmp_path / "files", 0)):
            cfg = DataConfig(root=root, workers=workers)
            with create_loader(create_source(cfg), cfg, SIZE, 10, 0) as loader:
                batches.append([next(loader) for _ in range(5)])
        for one, two, three in zip(*batches, strict=True):
            assert torch.equal(one.images, two.images)
            assert torch.equal(one.images, three.images)
            assert torch.equal(one.indices, three.indices)

    def test_resumes_where_it_was(self, shards):
        cfg = DataConfig(root=shards, workers=0)
        straight = TrainLoader(create_source(cfg), cfg, SIZE, 8, 0)
        expected = [next(straight) for _ in range(7)][4:]
        resumed = TrainLoader(create_source(cfg), cfg, SIZE, 8, 0)
        resumed.load_state({"step": 4, "images": 36})
        assert all(torch.equal(a.images, next(resumed).images) for a in expected)

    @pytest.mark.parametrize("label", ["cls", "json"])
    @pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_every_tar_format_and_either_label(self, tmp_path, samples, label, format):
        write_tar(tmp_path / "x.tar", samples[:5], label, format)
        index = indexed(tmp_path / "x.tar")
        assert keys(index) == [f"{key}.jpg" for key, _, _ in samples[:5]]
        assert index.labels.tolist() == [number for _, _, number in samples[:5]]
        assert not index.warnings

    @pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_long_and_foreign_names(self, tmp_path, samples, format):
        named = [("a/" * 60 + "long", *samples[0][1:]), ("é" * 80, *samples[1][1:]), ("short", *samples[2][1:])]
        write_tar(tmp_path / "x.tar", named, format=format)
        index = indexed(tmp_path / "x.tar")
        assert keys(index) == [f"{key}.jpg" for key, _, _ in named]
        assert NO_LABEL not in index.labels

    def test_a_sample_is_what_shares_a_name(self, tmp_path, samples):
        image = samples[0][1]
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name, content in [
                *(("./a/x.txt", b"words"), ("./a/x.seg.png", b"mask"), ("./a/x.JPG", image), ("./a/x.cls", b" 7\n")),
                *(("b.cls", b"8"), ("b.left.jpg", image), ("b.right.jpg", b"other")),
                *(("only.txt", b"no image"), ("._c.jpg", b"left by a Mac"), ("no_extension", b"")),
            ]:
                add(tar, name, content)
        index = indexed(tmp_path / "x.tar")
        assert keys(index) == ["./a/x.JPG", "b.left.jpg"]
        assert index.labels.tolist() == [7, 8]
        assert index.sizes.tolist() == [len(image)] * 2

    def test_names_split_at_the_first_dot(self):
        assert split_name(b"a.b/c.d.jpg") == (b"a.b/c", b"d.jpg")
        assert split_name(b"a.b/c") == (b"a.b/c", b"")
        assert split_name(b"a/.c.jpg")[0] is None

    def test_archives_one_after_the_other(self, tmp_path, samples):
        for number in range(2):
            write_tar(tmp_path / f"{number}.tar", samples[3 * number : 3 * number + 3])
        (tmp_path / "x.tar").write_bytes((tmp_path / "0.tar").read_bytes() + (tmp_path / "1.tar").read_bytes())
        assert len(indexed(tmp_path / "x.tar")) == 6

    def test_workers_that_start_afresh_get_it(self, shards, monkeypatch):
        monkeypatch.setattr("fastmim.data.workers._start_method", lambda: "spawn")
        batches = []
        for workers in (0, 1):
            cfg = DataConfig(root=shards, workers=workers)
            source = create_source(cfg)
            source.encoded(0)  # has a file open
            with create_loader(source, cfg, SIZE, 36, 0) as loader:
                batches.append(next(loader))
        assert torch.equal(batches[0].images, batches[1].images)
        assert batches[1].replaced == 0

    def test_few_files_are_open_at_a_time(self, tmp_path, samples):
        for number in range(80):
            write_tar(tmp_path / f"{number:03d}.tar", samples[:1])
        source = create_source(DataConfig(root=tmp_path))
        assert len(stored(source)) == 80
        assert sum(os.readlink(f"/proc/self/fd/{fd}").endswith(".tar") for fd in _open_files()) <= 64


def _open_files():
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


class TestWhatRootMeans:
    def test_a_file_a_pattern_and_a_folder(self, shards):
        assert len(create_source(DataConfig(root=shards / "train-000001.tar"))) == 12
        assert len(create_source(DataConfig(root=shards / "train-{000000..000001}.tar"))) == 24
        assert len(create_source(DataConfig(root=shards / "{train-000002,train-000000}.tar"))) == 24
        assert len(create_source(DataConfig(root=shards, source="webdataset"))) == 36

    def test_tars_beside_images_are_left_alone(self, shards, class_folder):
        (shards / "n01").mkdir()
        shutil.copy(next((class_folder / "coffee").iterdir()), shards / "n01" / "1.jpg")
        assert create_source(DataConfig(root=shards)).name.startswith("folder")

    @pytest.mark.parametrize("apart", ["folders", "names"])
    def test_the_held_out_part(self, tmp_path, samples, apart):
        join = (lambda part: f"{part}/0.tar") if apart == "folders" else (lambda part: f"imagenet-{part}-000.tar")
        write_tar(tmp_path / join("train"), samples[:9])
        write_tar(tmp_path / join("validation"), samples[10:12])
        cfg = DataConfig(root=tmp_path)
        assert len(create_source(cfg)) == 9
        held_out = held_out_source(cfg)
        assert held_out.classes == ["10", "20", "30"]
        assert held_out.labels.tolist() == [1, 2]
        assert next(eval_batches(held_out, cfg, SIZE, 8))[1].tolist() == [1, 2]

    def test_no_held_out_part(self, shards):
        assert held_out_source(DataConfig(root=shards)) is None

    def test_classes_unknown_to_training_are_refused(self, tmp_path, samples):
        write_tar(tmp_path / "train" / "0.tar", samples[:2])
        write_tar(tmp_path / "val" / "0.tar", samples[2:3])
        with pytest.raises(DataError, match=r"training images do not have: 30"):
            held_out_source(DataConfig(root=tmp_path))

    def test_labels_that_some_lack_are_not_used(self, tmp_path, samples, caplog):
        write_tar(tmp_path / "0.tar", samples[:3])
        write_tar(tmp_path / "1.tar", samples[3:6], label="")
        source = create_source(DataConfig(root=tmp_path))
        source.report()
        assert source.labels is source.classes is None
        assert f"3 images of 6 without a label (the first is 1.tar/{samples[3][0]}.jpg)" in caplog.text

    @pytest.mark.parametrize(
        "root, words",
        [
            ("https://host/shards-{000..009}.tar", "is an address, but only files are read"),
            ("s3://bucket/x.tar", "is an address, but only files are read"),
            ("pipe:curl -s https://host/x.tar", "is a command; commands are never run"),
            ("gone-{0..3}.tar", "none of the 4 files"),
            ("gone.tar", "does not exist"),
            ("x-{3..0}.tar", "is no range of whole numbers"),
            ("x-{0..99999999}.tar", "stands for more than 1,000,000 files"),
            ("x-{0..9999}{0..9999}.tar", "stands for more than 1,000,000 files"),
        ],
    )
    @pytest.mark.parametrize("source", [None, "webdataset"])
    def test_what_cannot_be(self, tmp_path, monkeypatch, root, words, source):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DataError, match=words):
            create_source(DataConfig(root=Path(root), source=source))

    def test_compressed_tars(self, tmp_path, samples):
        write_tar(tmp_path / "x.tar", samples[:2])
        subprocess.run(["gzip", "-k", tmp_path / "x.tar"], check=True)
        with pytest.raises(DataError, match=r"compressed.*decompress it"):
            create_source(DataConfig(root=tmp_path / "x.tar.gz"))
        (tmp_path / "x.tar").unlink()
        with pytest.raises(DataError, match=r"x.tar.gz.*is compressed"):
            create_source(DataConfig(root=tmp_path, source="webdataset"))
        (tmp_path / "x.tar.gz").rename(tmp_path / "x.tar")
        with pytest.raises(DataError, match="All are damaged"):
            create_source(DataConfig(root=tmp_path))


class TestDamage:
    def test_any_beginning_of_a_shard_keeps_the_samples_that_are_whole(self, tmp_path, samples):
        small = [(key, image[:700], number) for key, image, number in samples[:6]]  # places matter, pixels do not
        places = write_tar(tmp_path / "whole.tar", small)
        content = (tmp_path / "whole.tar").read_bytes()
        lengths = {at + by for place in places for at in place for by in (-512, -511, -1, 0, 1, 2, 512)}
        for length in sorted(lengths | set(range(0, len(content), 61))):
            (tmp_path / "cut.tar").write_bytes(content[:length])
            index = indexed(tmp_path / "cut.tar")
            whole = [key for (key, _, _), (_, end) in zip(small, places, strict=True) if end <= length]
            # The label is the last member: its padding may be missing, and the next sample is complete without.
            assert keys(index)[: len(whole)] == [f"{key}.jpg" for key in whole]
            assert len(index) <= len(whole) + 1
            assert (index.offsets + index.sizes <= length).all()
            ended = length >= places[-1][1] + 512
            assert index.damaged != ended
            assert NO_LABEL not in index.labels[:-1], "no sample without its label costs the others theirs"
            assert len(index) < 2 or index.labels[-1] != NO_LABEL

    def test_any_flipped_byte_is_survived(self, tmp_path, samples):
        places = write_tar(tmp_path / "whole.tar", samples[:4])
        content = (tmp_path / "whole.tar").read_bytes()
        rng = random.Random(0)
        headers = [start - 512 + rng.randrange(512) for start, _ in places for _ in range(30)]
        for at in headers + [rng.randrange(len(content)) for _ in range(100)]:
            flipped = bytearray(content)
            flipped[at] ^= 1 << rng.randrange(8)
            (tmp_path / "flipped.tar").write_bytes(flipped)
            index = indexed(tmp_path / "flipped.tar")
            before = sum(end <= at for _, end in places)
            assert len(index) >= before
            assert index.offsets[:before].tolist() == [start for start, _ in places[:before]]

    def test_the_warning_names_shard_and_place_each_time(self, shards, samples, caplog, monkeypatch):
        places = write_tar(shards / "train-000001.tar", samples[12:24])
        content = bytearray((shards / "train-000001.tar").read_bytes())
        content[places[4][1] + 10] ^= 255
        (shards / "train-000001.tar").write_bytes(content)
        (shards / "train-000002.tar").unlink()
        for _ in range(2):  # built, then kept
            caplog.clear()
            monkeypatch.setattr("fastmim.data.sources._said", set())  # as in another process
            source = create_source(DataConfig(root=shards / "train-{000000..000002}.tar"))
            assert len(source) == 12 + 5
            source.report()
            source.report()
            assert len(caplog.records) == 2
            assert f"train-000001.tar: damaged at byte {places[4][1]:,} (a header with a wrong checksum)" in caplog.text
            assert "train-000002.tar: missing: it is left out" in caplog.text
            assert source.damaged == 2
        assert stored(source) == [image for _, image, _ in samples[:17]]

    def test_nothing_left(self, tmp_path):
        (tmp_path / "x.tar").write_bytes(b"<html>404 Not Found</html>" * 100)
        with pytest.raises(DataError, match=r"no images in the 1 shards .* All are damaged"):
            create_source(DataConfig(root=tmp_path))

    def test_a_shard_that_changes_while_training_is_replaced_image_by_image(self, shards, caplog):
        cfg = DataConfig(root=shards, workers=0, bad_budget=12)
        with create_loader(create_source(cfg), cfg, SIZE, 36, 0) as loader:
            assert next(loader).replaced == 0
            os.truncate(shards / "train-000001.tar", 20_000)
            batch = next(loader)
        assert 1 <= batch.replaced <= 12
        assert "train-000001.tar/" in caplog.text

    def test_a_shard_that_is_another_than_was_indexed_is_not_read(self, shards, samples):
        source = create_source(DataConfig(root=shards))
        write_tar(shards / "train-000000.tar", samples[12:24])
        os.utime(shards / "train-000000.tar", ns=(0, 0))
        with pytest.raises(ValueError, match="changed since it was indexed"):
            source.encoded(0)

    def test_a_named_pipe_does_not_stop_us(self, shards):
        os.mkfifo(shards / "pipe.tar")
        assert len(create_source(DataConfig(root=shards / "{pipe,train-000000}.tar"))) == 12


def hostile(tmp_path, image):
    """A tar of members that no one should write, follow or load, between two good samples."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "good_1.jpg", image)
        add(tar, "../../x.jpg", image)
        add(tar, "/etc/passwd.jpg", image)
        add(tar, "link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "hard.jpg", type=tarfile.LNKTYPE, linkname="good_1.jpg")
        add(tar, "device.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5)
        add(tar, "fifo.jpg", type=tarfile.FIFOTYPE)
        add(tar, "code.jpg", image)
        add(tar, "code.pkl", PICKLE)
        add(tar, "code.pyd", b"\x80\x04")
        add(tar, "code.pth", b"\x80\x04")
        add(tar, "new\nline\x1b[2J.jpg", image)
        add(tar, "good_2.jpg", image)
    return tmp_path / "x.tar"


class TestHostile:
    def test_members_are_read_where_they_lie_and_never_written(self, tmp_path, samples, caplog):
        image = samples[0][1]
        path = hostile(tmp_path, image)
        before = set(tmp_path.rglob("*"))
        source = create_source(DataConfig(root=path))
        source.report()
        names = [source.name_of(index).decode().removeprefix("x.tar/") for index in range(len(source))]
        good = ["good_1.jpg", "../../x.jpg", "/etc/passwd.jpg", "code.jpg", "new\\x0aline\\x1b[2J.jpg", "good_2.jpg"]
        assert names == good
        assert stored(source) == [image] * len(good)
        assert caplog.text.count("links, devices or the like") == 1
        assert "4 members that are links, devices or the like are left out, the first being link.jpg" in caplog.text
        assert {path.name for path in set(tmp_path.rglob("*")) - before} == {".x.tar.fastmim-index"}
        assert not (tmp_path.parent.parent / "x.jpg").exists()

    def test_a_member_beyond_reason_is_not_read(self, tmp_path, samples):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            add(tar, "huge.jpg", bytes(5000))
            add(tar, "good.jpg", samples[0][1][:2000])
        source = create_source(DataConfig(root=tmp_path / "x.tar", max_pixels=500))
        with pytest.raises(ValueError, match=r"5,000 bytes, more than 8 for each of data\.max_pixels"):
            source.open(0)
        assert len(source.encoded(1)) == 2000

    @pytest.mark.parametrize(
        "pax, reason",
        [
            ({"size": "-5"}, "number that is none"),
            ({"size": "9" * 30}, "number that is none"),
            ({"size": "9" * 18}, "cut off"),
            ({"path": "x" * (1 << 20)}, "an extension header of"),
        ],
    )
    def test_pax_headers(self, tmp_path, samples, pax, reason):
        with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            add(tar, "good.jpg", samples[0][1])
            add(tar, "bad.jpg", samples[0][1], pax_headers=pax)
            add(tar, "lost.jpg", samples[0][1])
        index = indexed(tmp_path / "x.tar")
        assert keys(index) == ["good.jpg"]
        assert index.damaged
        assert reason in index.warnings[0]

    @pytest.mark.parametrize(
        "payload", [b"", b"5", b"0 a=b\n", b"99 a=b\n", b"6 a=b ", b"-6 a=b\n", b"5 ab\n", b"7a=b\n"]
    )
    def test_pax_records_that_make_no_sense_end_the_walk_or_say_nothing(self, tmp_path, samples, payload):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            add(tar, "good.jpg", samples[0][1])
            add(tar, "pax", payload, type=tarfile.XHDTYPE)
            add(tar, "after.jpg", samples[0][1])
        assert keys(indexed(tmp_path / "x.tar"))[0] == "good.jpg"

    @pytest.mark.parametrize(
        "field, reason",
        [
            (b"\xff" * 12, "a negative number"),
            (b"\x80" + b"\xff" * 11, "cut off"),
            (b"77777777777\0", "cut off"),
            (b"-0000000001\0", "a number that is none"),
            (b"0x000000010\0", "a number that is none"),
        ],
    )
    def test_sizes_that_cannot_be(self, tmp_path, samples, field, reason):
        places = write_tar(tmp_path / "x.tar", samples[:3])
        content = bytearray((tmp_path / "x.tar").read_bytes())
        at = places[1][0] - 512
        header = bytearray(content[at : at + 512])
        header[124:136] = field
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        content[at : at + 512] = header
        (tmp_path / "x.tar").write_bytes(content)
        index = indexed(tmp_path / "x.tar")
        assert len(index) == 1
        assert f"damaged at byte {at:,}" in index.warnings[0]
        assert reason in index.warnings[0]

    def test_headers_and_zeros_without_end(self, tmp_path, samples):
        with tarfile.open(tmp_path / "long.tar", "w") as tar:
            add(tar, "good.jpg", samples[0][1])
            for _ in range(5000):
                add(tar, "pax", b"13 path=a.jpg"[:0], type=tarfile.XHDTYPE)
        assert keys(indexed(tmp_path / "long.tar")) == ["good.jpg"]
        with open(tmp_path / "sparse.tar", "wb") as file:
            file.truncate(1 << 40)
        assert len(indexed(tmp_path / "sparse.tar")) == 0

    @pytest.mark.parametrize(
        "name, content",
        [("x.cls", b"9" * 40), ("x.cls", b"cat"), ("x.cls", b"-1"), ("x.cls", b""), ("x.cls", bytes(100_000))]
        + [("x.json", text) for text in (b"[" * 100_000, b"{}", b"3", b"[1]", b'{"label": 1.5}', b'{"label": true}')]
        + [("x.json", b'{"label": %s}' % (b"9" * 5000)), ("x.json", b"\xff\xfe"), ("x.pkl", PICKLE)],
    )
    def test_labels_that_are_none(self, tmp_path, samples, name, content):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            add(tar, "x.jpg", samples[0][1])
            add(tar, name, content)
        index = indexed(tmp_path / "x.tar")
        assert (len(index), index.labels.tolist(), index.damaged) == (1, [NO_LABEL], False)


class TestIdx:
    @staticmethod
    def idx_of(path: Path) -> bytes:
        """What wds2idx writes."""
        lines: dict[str, list[str]] = {}
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, extension = info.name.partition(".")
                lines.setdefault(key, []).append(f"{extension} {info.offset_data} {info.size} {info.name}")
        return "\n".join([f"v1.2 {len(lines)}", *(" ".join(line) for line in lines.values())]).encode()

    def test_gives_the_same_samples(self, tmp_path, samples, monkeypatch):
        write_tar(tmp_path / "x.tar", samples[:6])
        walked = indexed(tmp_path / "x.tar")
        monkeypatch.setattr("fastmim.data.webdataset.members", None)  # nothing is walked
        for end in (b"", b"\n"):
            listed = indexed(tmp_path / "x.tar", self.idx_of(tmp_path / "x.tar") + end)
            assert keys(listed) == keys(walked)
            assert listed.offsets.tolist() == walked.offsets.tolist()
            assert listed.labels.tolist() == walked.labels.tolist()
            assert not listed.warnings

    def test_lies_beside_the_shard(self, tmp_path, samples, monkeypatch):
        write_tar(tmp_path / "x.tar", samples[:6])
        (tmp_path / "x.idx").write_bytes(self.idx_of(tmp_path / "x.tar"))
        monkeypatch.setattr("fastmim.data.webdataset.members", None)
        assert len(create_source(DataConfig(root=tmp_path))) == 6

    def test_one_that_does_not_fit_is_not_used(self, tmp_path, samples):
        write_tar(tmp_path / "x.tar", samples[:6])
        good = self.idx_of(tmp_path / "x.tar")
        write_tar(tmp_path / "other.tar", samples[:7])
        lines = good.split(b"\n")
        for idx in (
            *(
                b"",
                b"nonsense",
                b"v1.2 6\n",
                b"v1.1 6\n" + good.partition(b"\n")[2],
                self.idx_of(tmp_path / "other.tar"),
            ),
            *(b"\n".join(lines[:-1]), b"\n".join([lines[0], *lines[:0:-1]]), good.replace(b" ", b" -", 3), good + b" "),
            good.replace(b"jpg 512 ", b"jpg 513 "),
        ):
            index = indexed(tmp_path / "x.tar", idx)
            assert len(index) == 6
            assert index.warnings == ["the .idx file beside it does not fit it and is not used"]

    @pytest.mark.dali
    def test_is_what_dali_writes(self, tmp_path, samples):
        tool = shutil.which("wds2idx", path=os.path.dirname(sys.executable))
        if tool is None:
            pytest.skip("DALI is not installed")
        write_tar(tmp_path / "x.tar", samples[:6])
        subprocess.run([tool, tmp_path / "x.tar", tmp_path / "x.idx"], check=True, capture_output=True)
        assert (tmp_path / "x.idx").read_bytes().rstrip() == self.idx_of(tmp_path / "x.tar")
        index = indexed(tmp_path / "x.tar", (tmp_path / "x.idx").read_bytes())
        assert (len(index), index.warnings) == (6, [])


def test_json_labels_may_be_text(tmp_path, samples):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "x.jpg", samples[0][1])
        add(tar, "x.json", json.dumps({"cls": "12"}).encode())
    assert indexed(tmp_path / "x.tar").labels.tolist() == [12]
