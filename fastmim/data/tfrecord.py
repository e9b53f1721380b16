"""TFRecord files of tf.train.Example protos, read without TensorFlow.

A record is: length (8 bytes, little-endian), its checksum, data, its checksum. The image is the bytes feature
`image/encoded` (or `image`), the label the int64 feature `image/class/label` (or `label`); a negative one is none.
Records are named by their number in the file and the image's format. Lengths are checked when a file is indexed, data
each time it is read, so a flipped bit is found where no decoder would notice.

Where `NAME.idx` beside a file is an index as DALI's `tfrecord2idx` writes it, a damaged length costs one record only.
"""

import os
import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol

from fastmim.data.crc32c import masked_crc32c
from fastmim.data.shard_file import ShardError, ShardFile
from fastmim.data.shard_index import NO_LABEL, Rows, ShardIndex
from fastmim.data.shards import ShardSource, beside

IMAGE = (b"image/encoded", b"image")
LABEL = (b"image/class/label", b"label")

_HEADER, _FOOTER = 12, 4
_MOST_LOOKS = 20_000  # at an Example; one of an image takes some hundred
_MOST_IDX = 1 << 30
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class TFRecordSource(ShardSource):
    """The images in TFRecord files."""

    kind = "tfrecord"
    wanted_label = "a whole number for each image (image/class/label)"

    @staticmethod
    def index(path: bytes, file: ShardFile) -> ShardIndex:
        return index_tfrecord(file, beside(path, (b".tfrecord", b".tfrecords"), _MOST_IDX))

    def image_bytes(self, file: ShardFile, offset: int, size: int) -> bytes:
        record = file.read(offset, size + _FOOTER)
        data, stored = record[:size], int.from_bytes(record[size:], "little")
        if masked_crc32c(data) != stored:
            raise ValueError("the checksum of the record is wrong: damaged data")
        image, _ = example(_InMemory(data), 0, size)
        if image is None:
            raise ValueError(f"a record without {IMAGE[0].decode()}")
        return data[image[0] : image[0] + image[1]]


class Bytes(Protocol):
    """Something with bytes at places: a file or memory."""

    def at(self, offset: int, count: int) -> bytes: ...


class _Metered:
    """Bytes that may be looked at so many times only: no message keeps us busy for ever."""

    def __init__(self, data: Bytes) -> None:
        self._data, self._left = data, _MOST_LOOKS

    def at(self, offset: int, count: int) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"no tf.train.Example of an image: more than {_MOST_LOOKS:,} numbers to read")
        return self._data.at(offset, count)


class _InMemory:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def at(self, offset: int, count: int) -> bytes:
        return self._data[offset : offset + count]


def index_tfrecord(file: ShardFile, idx: bytes | None = None) -> ShardIndex:
    """The records of a file that hold an image; `idx` is the content of a `tfrecord2idx` index, used where it fits."""
    rows = Rows(file)
    listed = None if idx is None else _listed(idx, file)
    if idx is not None and listed is None:
        rows.warn("the .idx file beside it does not fit it and is not used")
    useless: list[int] = []
    broken = False
    try:
        for number, (offset, size) in enumerate(_records(file) if listed is None else listed):
            try:
                image, label = example(file, offset, offset + size)
            except ShardError:
                raise
            except ValueError:  # framed well, but no Example: it is left out, others are not
                image, label, broken = None, NO_LABEL, True
            if image is None:
                useless.append(offset)
            else:
                rows.add(b"%d%b" % (number, _ending(file.at(image[0], min(12, image[1])))), offset, size, label)
    except ShardError as error:
        rows.fault(error)
    if useless:
        rows.warn(
            f"{len(useless)} records without an image ({' or '.join(map(os.fsdecode, IMAGE))}) are left out, "
            f"the first at byte {useless[0] - _HEADER:,}",
            damaged=broken,
        )
    return rows.index()


def _ending(head: bytes) -> bytes:
    """What the name of a file that begins so would end in."""
    if head.startswith(b"\xff\xd8\xff"):
        return b".jpg"
    if head.startswith(b"\x89PNG"):
        return b".png"
    return b".webp" if head.startswith(b"RIFF") and head.endswith(b"WEBP") else b""


def _records(file: ShardFile) -> Iterator[tuple[int, int]]:
    """Offset and size of the data of each record.

    Raises:
        ShardError: after the last good one, where a length is wrong or the file is cut off.
    """
    at = 0
    while at < file.size:
        if at + _HEADER > file.size:
            raise ShardError(at, f"cut off: {file.size - at} bytes of a record's header")
        size = _length(file.at(at, _HEADER))
        if size is None:
            packed = at == 0 and file.at(0, 2) == b"\x1f\x8b"
            raise ShardError(
                at, "compressed with gzip, which has no random access" if packed else "a length with a wrong checksum"
            )
        if at + _HEADER + size + _FOOTER > file.size:
            raise ShardError(at, f"cut off: a record of {size:,} bytes, {max(0, file.size - at - _HEADER):,} left")
        yield at + _HEADER, size
        at += _HEADER + size + _FOOTER


def _length(header: bytes) -> int | None:
    size, stored = struct.unpack("<QI", header)
    return size if masked_crc32c(header[:8]) == stored else None


def _listed(idx: bytes, file: ShardFile) -> list[tuple[int, int]] | None:
    """The records that an index lists, or None where it is none of this file."""
    found = []
    for line in idx.splitlines():
        words = line.split()
        if len(words) != 2 or any(len(word) > 18 or word.strip(b"0123456789") for word in words):
            return None
        offset, size = int(words[0]), int(words[1])
        if size < _HEADER + _FOOTER or offset + size > file.size:
            return None
        found.append((offset + _HEADER, size - _HEADER - _FOOTER))
    if not found or found[0][0] != _HEADER or found[-1][0] + found[-1][1] + _FOOTER != file.size:
        return None
    whole = all(one[0] + one[1] + _FOOTER + _HEADER == two[0] for one, two in pairwise(found))
    fitting = any(_length(file.at(offset - _HEADER, _HEADER)) == size for offset, size in (found[0], found[-1]))
    return found if whole and fitting else None


def example(data: Bytes, at: int, end: int) -> tuple[tuple[int, int] | None, int]:
    """Of the Example from `at` to `end`: where its encoded image lies (offset, size) or None, and its label.

    Only the fields on the way are read, so an image need not be.

    Raises:
        ValueError: the bytes are no such message.
    """
    data = _Metered(data)
    features: dict[bytes, tuple[int, int]] = {}
    for number, kind, start, stop in _fields(data, at, end):
        if (number, kind) == (1, _BYTES):  # Example.features
            for inner, inner_kind, entry, entry_end in _fields(data, start, stop):
                if (inner, inner_kind) == (1, _BYTES):  # Features.feature, a map
                    _entry(data, entry, entry_end, features)
    image = next((features[name] for name in IMAGE if name in features), None)
    label = next((features[name] for name in LABEL if name in features), None)
    return (
        None if image is None else _first_bytes(data, *image),
        NO_LABEL if label is None else _first_int(data, *label),
    )


def _entry(data: Bytes, at: int, end: int, features: dict[bytes, tuple[int, int]]) -> None:
    key, value = b"", (at, at)
    for number, kind, start, stop in _fields(data, at, end):
        if (number, kind) == (1, _BYTES) and stop - start <= 64:
            key = data.at(start, stop - start)
        elif (number, kind) == (2, _BYTES):
            value = start, stop
    if key in IMAGE or key in LABEL:
        features[key] = value


def _first_bytes(data: Bytes, at: int, end: int) -> tuple[int, int] | None:
    """Where the first of a feature's byte strings lies: Feature.bytes_list.value[0]."""
    for number, kind, start, stop in _fields(data, at, end):
        if (number, kind) == (1, _BYTES):
            for inner, inner_kind, first, last in _fields(data, start, stop):
                if (inner, inner_kind) == (1, _BYTES):
                    return first, last - first
    return None


def _first_int(data: Bytes, at: int, end: int) -> int:
    """The first of a feature's whole numbers, packed or not: Feature.int64_list.value[0]; NO_LABEL below 0."""
    for number, kind, start, stop in _fields(data, at, end):
        if (number, kind) == (3, _BYTES):
            for inner, inner_kind, first, last in _fields(data, start, stop):
                if inner == 1 and inner_kind in (_VARINT, _BYTES) and first < last:
                    value, _ = _varint(data, first, last)
                    return value if value < 1 << 62 else NO_LABEL  # negative ones have the top bit
    return NO_LABEL


def _fields(data: Bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, start and end of each field of a message."""
    while at < end:
        tag, start = _varint(data, at, end)
        kind = tag & 7
        if kind == _VARINT:
            _, at = _varint(data, start, end)
        elif kind == _BYTES:
            size, start = _varint(data, start, end)
            at = start + size
        elif kind in (_FIXED64, _FIXED32):
            at = start + (8 if kind == _FIXED64 else 4)
        else:
            raise ValueError(f"no tf.train.Example: wire type {kind}")
        if at > end:
            raise ValueError("no tf.train.Example: a field that is longer than what holds it")
        yield tag >> 3, kind, start, at


def _varint(data: Bytes, at: int, end: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = 0
    for place, byte in enumerate(data.at(at, min(10, end - at))):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value & (1 << 64) - 1, at + place + 1
    raise ValueError("no tf.train.Example: a number without an end")
