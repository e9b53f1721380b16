import contextlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmim.data import BadDataError, DataConfig, DataError, create_loader, create_source, held_out_source
from fastmim.data.crc32c import crc32c
from fastmim.data.shard_file import ShardFile
from fastmim.data.shard_index import NO_LABEL
from fastmim.data.tfrecord import index_tfrecord
from tests.data.write_shards import (
    bytes_list,
    example,
    feature,
    field,
    int64_list,
    record,
    varint,
    write_tfrecord,
)

SIZE = (32, 32)


@pytest.fixture
def shards(samples, tmp_path):
    """Three shards of twelve."""
    folder = tmp_path / "shards"
    for number in range(3):
        write_tfrecord(folder / f"train-{number:05d}-of-00003", samples[12 * number : 12 * number + 12])
    return folder


def indexed(path: Path, idx: bytes | None = None):
    return index_tfrecord(ShardFile(os.fsencode(path)), idx)


def index_of(tmp_path, *records):
    (tmp_path / "x.tfrecord").write_bytes(b"".join(records))
    return indexed(tmp_path / "x.tfrecord")


def keys(index):
    return [int(index.key(number).split(b".")[0]) for number in range(len(index))]


class TestReading:
    def test_every_image_as_it_is_stored_with_its_label(self, shards, samples):
        source = create_source(DataConfig(root=shards))
        assert source.name.startswith("tfrecord")
        assert [source.encoded(index) for index in range(36)] == [image for _, image, _ in samples]
        assert source.classes == ["10", "20", "30"]
        assert [source.classes[label] for label in source.labels] == [str(label) for _, _, label in samples]
        assert source.path(13) == f"{shards}/train-00001-of-00003/1.jpg"

    def test_a_batch_is_that_of_the_same_files_in_a_folder(self, shards, samples, tmp_path):
        (tmp_path / "files").mkdir()
        for number, (_, image, _) in enumerate(samples):
            (tmp_path / "files" / f"{number:03d}.jpg").write_bytes(image)
        batches = []
        for root, workers in ((shards, 2), (tmp_path / "files", 0)):
            cfg = DataConfig(root=root, workers=workers)
            with create_loader(create_source(cfg), cfg, SIZE, 10, 0) as loader:
                batches.append([next(loader) for _ in range(5)])
        for one, two in zip(*batches, strict=True):
            assert torch.equal(one.images, two.images)

    def test_the_held_out_part_lies_in_the_same_folder(self, shards, samples):
        write_tfrecord(shards / "validation-00000-of-00001", samples[1:3])
        source = create_source(DataConfig(root=shards))
        assert len(source) == 36
        assert held_out_source(DataConfig(root=shards)).labels.tolist() == [1, 2]

    def test_without_labels(self, tmp_path, samples):
        write_tfrecord(tmp_path / "x.tfrecords", samples[:3], labelled=False)
        source = create_source(DataConfig(root=tmp_path / "x.tfrecords"))
        assert source.labels is source.classes is None
        assert "image/class/label" in source.unlabelled

    def test_features_may_have_their_short_names_and_any_order(self, tmp_path):
        label, image = feature(b"label", int64_list(7, 8)), feature(b"image", bytes_list(b"one", b"two"))
        value_first = field(1, field(2, bytes_list(b"three")) + field(1, b"image"))
        index = index_of(
            tmp_path,
            *(
                record(field(1, label + image)),
                record(field(1, label) + field(1, image)),
                record(field(1, value_first)),
            ),
            record(b"\x10\x05" + b"\x19" + bytes(8) + b"\x25" + bytes(4) + field(1, image)),  # fields of other kinds
        )
        assert keys(index) == [0, 1, 2, 3]
        assert index.labels.tolist() == [7, 7, NO_LABEL, NO_LABEL]

    def test_negative_labels_are_none(self, tmp_path):
        assert index_of(tmp_path, record(example(b"image", -1))).labels.tolist() == [NO_LABEL]

    def test_a_large_image_before_the_label_is_not_read(self, tmp_path, monkeypatch):
        (tmp_path / "x.tfrecord").write_bytes(record(example(bytes(1 << 20), 5)) * 2)
        read = []
        pread = os.pread
        monkeypatch.setattr(os, "pread", lambda fd, count, at: read.append(count) or pread(fd, count, at))
        assert indexed(tmp_path / "x.tfrecord").labels.tolist() == [5, 5]
        assert sum(read) < 50_000


class TestDamage:
    def test_any_beginning_of_a_file_keeps_the_records_that_are_whole(self, tmp_path, samples):
        small = [(key, image[:300], label) for key, image, label in samples[:5]]
        ends = write_tfrecord(tmp_path / "whole.tfrecord", small)
        content = (tmp_path / "whole.tfrecord").read_bytes()
        for length in range(len(content) + 1):
            (tmp_path / "cut.tfrecord").write_bytes(content[:length])
            index = indexed(tmp_path / "cut.tfrecord")
            whole = sum(end <= length for end in ends)
            assert keys(index) == list(range(whole))
            assert index.damaged == (length not in (0, *ends))
            assert not index.damaged or f"damaged at byte {([0, *ends])[whole]:,} (cut off" in index.warnings[0]

    def test_any_flipped_bit_is_found_before_it_is_used(self, tmp_path, samples):
        small = [(key, image[:300], label) for key, image, label in samples[:4]]
        ends = write_tfrecord(tmp_path / "whole.tfrecord", small)
        content = (tmp_path / "whole.tfrecord").read_bytes()
        rng = random.Random(0)
        for number in range(200):
            at = rng.randrange(len(content))
            flipped = bytearray(content)
            flipped[at] ^= 1 << rng.randrange(8)
            path = tmp_path / f"{number}.tfrecord"
            path.write_bytes(flipped)
            before = sum(end <= at for end in ends)
            try:
                source = create_source(DataConfig(root=path))
            except DataError:
                assert before == 0
                continue
            good = {}
            for index in range(len(source)):
                with contextlib.suppress(ValueError):
                    good[int(source.name_of(index).rpartition(b"/")[2].split(b".")[0])] = source.encoded(index)
            assert set(range(before)) <= set(good)
            assert before not in good, "the record with the flipped bit"
            assert all(image == small[record][1] for record, image in good.items())

    def test_images_with_a_wrong_checksum_are_replaced_and_counted(self, shards, caplog):
        path = shards / "train-00001-of-00003"
        content = bytearray(path.read_bytes())
        content[3000] ^= 1
        path.write_bytes(content)
        cfg = DataConfig(root=shards, workers=0)
        with create_loader(create_source(cfg), cfg, SIZE, 36, 0) as loader:
            assert next(loader).replaced == 1
        assert "train-00001-of-00003/0.jpg (ValueError: the checksum of the record is wrong" in caplog.text
        cfg.bad_budget = 0
        with create_loader(create_source(cfg), cfg, SIZE, 36, 0) as loader, pytest.raises(BadDataError):
            next(loader)

    def test_missing_shards_are_known_from_the_names_of_the_others(self, shards, caplog):
        (shards / "train-00001-of-00003").unlink()
        source = create_source(DataConfig(root=shards))
        source.report()
        assert len(source) == 24
        assert "train-00001-of-00003: missing: it is left out" in caplog.text

    def test_gzip(self, shards):
        for path in shards.iterdir():
            subprocess.run(["gzip", path], check=True)
            path.with_name(path.name + ".gz").rename(path)
        with pytest.raises(DataError, match="All are damaged"):
            create_source(DataConfig(root=shards))


class TestHostile:
    def test_records_that_are_no_examples_are_left_out_alone(self, tmp_path):
        image = feature(b"image/encoded", bytes_list(b"image"))
        bad = [
            b"\xff" * 50,
            b"\x0a\xff\xff\xff\xff\x0f",  # longer than the record
            field(1, field(1, field(1, b"image/encoded") + b"\x12\x7f")),
            field(1, field(1, b"\x0b\x0c")),  # a group
            b"\x0a" + b"\x80" * 11,  # a number without an end
            field(1, image * 30_000),
        ]
        index = index_of(tmp_path, *map(record, bad), record(field(1, image)))
        assert keys(index) == [len(bad)]
        assert index.damaged
        assert index.warnings == [
            f"{len(bad)} records without an image (image/encoded or image) are left out, the first at byte 0"
        ]

    def test_records_of_something_else_are_no_damage(self, tmp_path):
        others = [record(b""), record(field(1, feature(b"text", bytes_list(b"words"))))]
        index = index_of(tmp_path, *others, record(field(1, feature(b"image", int64_list(3)))))
        assert (len(index), index.damaged) == (0, False)
        assert "3 records without an image" in index.warnings[0]

    def test_a_length_of_everything(self, tmp_path):
        length = b"\xff" * 8
        huge = length + (((crc := crc32c(length)) >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF).to_bytes(4, "little")
        index = index_of(tmp_path, record(example(b"image", 1)), huge + bytes(100))
        assert keys(index) == [0]
        assert "cut off: a record of 18,446,744,073,709,551,615 bytes, 100 left" in index.warnings[0]

    def test_varints(self):
        assert varint(300) == b"\xac\x02"
        assert len(varint(-1)) == 10


class TestIdx:
    @staticmethod
    def idx_of(ends):
        """What tfrecord2idx writes."""
        return "".join(f"{start} {end - start}\n" for start, end in zip([0, *ends], ends, strict=False)).encode()

    def test_a_damaged_length_costs_one_record_only(self, tmp_path, samples):
        ends = write_tfrecord(tmp_path / "x.tfrecord", samples[:6])
        content = bytearray((tmp_path / "x.tfrecord").read_bytes())
        content[ends[2]] ^= 1
        (tmp_path / "x.tfrecord").write_bytes(content)
        assert keys(indexed(tmp_path / "x.tfrecord")) == [0, 1, 2]
        index = indexed(tmp_path / "x.tfrecord", self.idx_of(ends))
        assert keys(index) == [0, 1, 2, 3, 4, 5]
        (tmp_path / "x.idx").write_bytes(self.idx_of(ends))
        (tmp_path / ".x.tfrecord.fastmim-index").unlink(missing_ok=True)
        source = create_source(DataConfig(root=tmp_path))
        assert [source.encoded(number) for number in range(6)] == [image for _, image, _ in samples[:6]]

    def test_one_that_does_not_fit_is_not_used(self, tmp_path, samples):
        ends = write_tfrecord(tmp_path / "x.tfrecord", samples[:6])
        good = self.idx_of(ends)
        for idx in (
            *(b"", b"nonsense\n", b"1 2 3\n", b"0 -5\n", b"0 " + b"9" * 30, good[:-2], good + good),
            *(self.idx_of(ends[:-1]), self.idx_of([*ends[:3], ends[3] + 1, *ends[4:]])[1:]),
        ):
            index = indexed(tmp_path / "x.tfrecord", idx)
            assert keys(index) == list(range(6))
            assert index.warnings == ["the .idx file beside it does not fit it and is not used"]

    @pytest.mark.dali
    def test_is_what_dali_writes(self, tmp_path, samples):
        tool = shutil.which("tfrecord2idx", path=os.path.dirname(sys.executable))
        if tool is None:
            pytest.skip("DALI is not installed")
        ends = write_tfrecord(tmp_path / "x.tfrecord", samples[:6])
        subprocess.run([sys.executable, tool, tmp_path / "x.tfrecord", tmp_path / "x.idx"], check=True)
        assert (tmp_path / "x.idx").read_bytes() == self.idx_of(ends)
        assert not indexed(tmp_path / "x.tfrecord", self.idx_of(ends)).warnings


class TestChecksum:
    def test_known_values(self):
        """RFC 3720, appendix B.4."""
        assert crc32c(b"123456789") == 0xE3069283
        assert crc32c(bytes(32)) == 0x8A9136AA
        assert crc32c(b"\xff" * 32) == 0x62A8AB43
        assert crc32c(bytes(range(32))) == 0x46DD794E

    @pytest.mark.parametrize("length", [0, 1, 255, 511, 512, 513, 767, 768, 70_001, 4096 * 256 + 300])
    def test_blocks_give_what_bytes_give(self, length):
        data = random.Random(length).randbytes(length)
        state = 0xFFFFFFFF
        for byte in data:
            state ^= byte
            for _ in range(8):
                state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
        assert crc32c(data) == state ^ 0xFFFFFFFF
