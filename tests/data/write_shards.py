"""Shards as their own tools write them: tar by the standard library, TFRecord byte by byte."""

import io
import struct
import tarfile
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path

from fastmim.data.crc32c import masked_crc32c

Sample = tuple[str, bytes, int]  # key, encoded image, label


def samples_of(folder: Path, count: int | None = None) -> list[Sample]:
    """The JPEGs of class folders, classes taking turns; labels 10, 20, 30."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    columns = [sorted(path.iterdir()) for path in classes]
    samples = [
        (f"{path.parent.name}/{path.stem}", path.read_bytes(), 10 * number)
        for row in zip(*columns, strict=True)
        for number, path in enumerate(row, 1)
    ]
    return samples[:count]


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def write_tar(
    path: Path, samples: Iterable[Sample], label: str = "cls", format: int = tarfile.GNU_FORMAT
) -> list[tuple[int, int]]:
    """A shard; where the image of each sample begins, and where the sample ends. `label` is cls, json or nothing."""
    places = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for key, image, number in samples:
            add(tar, f"{key}.jpg", image)
            start = tar.offset - -(-len(image) // 512) * 512
            if label == "cls":
                add(tar, f"{key}.cls", b"%d" % number)
            elif label == "json":
                add(tar, f"{key}.json", b'{"label": %d, "text": "a b"}' % number)
            places.append((start, tar.offset))
    return places


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def feature(key: bytes, value: bytes) -> bytes:
    return field(1, field(1, key) + field(2, value))


def bytes_list(*values: bytes) -> bytes:
    return field(1, b"".join(field(1, value) for value in values))


def int64_list(*values: int, packed: bool = True) -> bytes:
    inner = b"".join(varint(value) for value in values)
    return field(3, field(1, inner) if packed else b"".join(b"\x08" + varint(value) for value in values))


def example(image: bytes, label: int | None, packed: bool = True, first: bool = False) -> bytes:
    """An Example as the usual ImageNet converters write them; `first`: the label before the image."""
    features = [feature(b"image/encoded", bytes_list(image))]
    if label is not None:
        features.insert(0 if first else 1, feature(b"image/class/label", int64_list(label, packed=packed)))
    features.insert(1, feature(b"image/height", int64_list(120)))
    features.append(feature(b"image/object/bbox/xmin", field(2, field(1, struct.pack("<2f", 0.1, 0.2)))))
    return field(1, b"".join(features))


def record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + masked_crc32c(length).to_bytes(4, "little") + data + masked_crc32c(data).to_bytes(4, "little")


def write_tfrecord(path: Path, samples: Sequence[Sample], labelled: bool = True) -> list[int]:
    """A shard; where each record ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [
        record(example(image, label if labelled else None, packed=number % 2 == 0, first=number % 3 == 0))
        for number, (_, image, label) in enumerate(samples)
    ]
    path.write_bytes(b"".join(records))
    return list(accumulate(map(len, records)))
