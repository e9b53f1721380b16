"""WebDataset's tar shards: members of one name but for their extensions are a sample.

The image of a sample is its member with an image's extension (`x.jpg`; else `x.anything.jpg`), its label the whole
number in `x.cls`, else under "label" or "cls" in `x.json`. No other member is ever read, whatever it holds.

Where `NAME.idx` (or `NAME.tar.idx`) beside a shard is an index as DALI's `wds2idx` writes it, and fits the shard, the
shard's headers are not read one by one.
"""

import json
import os
from collections.abc import Iterable, Iterator
from itertools import pairwise

from fastmim.data.errors import printable
from fastmim.data.listing import EXTENSIONS
from fastmim.data.shard_file import ShardError, ShardFile
from fastmim.data.shard_index import NO_LABEL, Rows, ShardIndex
from fastmim.data.shards import ShardSource, beside
from fastmim.data.tar import Member, is_end, is_member, members

_MOST_JSON = 1 << 20
_MOST_IDX = 1 << 30


class WebDatasetSource(ShardSource):
    """The images in tar shards."""

    kind = "webdataset"
    wanted_label = "a member with a whole number for each image (x.cls beside x.jpg)"

    @staticmethod
    def index(path: bytes, file: ShardFile) -> ShardIndex:
        return index_tar(file, idx_of(path))


class _Sample:
    """What is known of a sample while its members come by."""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.image: Member | None = None
        self.plain = False  # the image is "x.jpg", not "x.anything.jpg"
        self.cls: Member | None = None
        self.json: Member | None = None

    def take(self, extension: bytes, member: Member) -> None:
        plain = b"." + extension in EXTENSIONS
        if extension.endswith(EXTENSIONS) or plain:
            if self.image is None or (plain and not self.plain):
                self.image, self.plain = member, plain
        elif extension == b"cls":
            self.cls = member
        elif extension == b"json":
            self.json = member

    def label(self, file: ShardFile) -> int:
        if self.cls is not None:
            return _whole(file.at(self.cls.offset, self.cls.size)) if self.cls.size <= 64 else NO_LABEL
        if self.json is None or self.json.size > _MOST_JSON:
            return NO_LABEL
        try:
            fields = json.loads(file.at(self.json.offset, self.json.size))
        except (ValueError, RecursionError):
            return NO_LABEL
        if not isinstance(fields, dict):
            return NO_LABEL
        value = next((fields[name] for name in ("label", "cls") if name in fields), None)
        return _whole(str(value).encode()) if isinstance(value, int | str) else NO_LABEL


def index_tar(file: ShardFile, idx: bytes | None = None) -> ShardIndex:
    """The samples of a tar file; `idx` is the content of a `wds2idx` index, used where it fits."""
    rows = Rows(file)
    if idx is not None:
        listed = _listed(idx, file)
        if listed is not None:
            _collect(rows, file, listed)
            return rows.index()
        rows.warn("the .idx file beside it does not fit it and is not used")
    others: list[bytes] = []
    try:
        _collect(rows, file, _files(members(file), others))
    except ShardError as error:
        rows.fault(error)
    if others:
        first = printable(os.fsdecode(others[0]))
        rows.warn(f"{len(others)} members that are links, devices or the like are left out, the first being {first}")
    return rows.index()


def _files(walked: Iterable[Member], others: list[bytes]) -> Iterator[Member]:
    for member in walked:
        if member.kind == "file":
            yield member
        elif member.kind == "other":
            others.append(member.name[:200])


def _collect(rows: Rows, file: ShardFile, walked: Iterable[Member]) -> None:
    """Add the samples of `walked`; where it raises, those that were whole are in already."""
    sample: _Sample | None = None
    labelled = False
    try:
        for member in walked:
            key, extension = split_name(member.name)
            if key is None:
                continue
            if sample is None or sample.key != key:
                labelled |= _add(rows, file, sample)
                sample = _Sample(key)
            sample.take(extension, member)
    except ShardError:
        # The label may have been in what is lost: without it the sample would leave all others without.
        if not labelled or (sample is not None and sample.label(file) != NO_LABEL):
            _add(rows, file, sample)
        raise
    _add(rows, file, sample)


def _add(rows: Rows, file: ShardFile, sample: _Sample | None) -> bool:
    """Whether the sample, if it is one, has a label."""
    if sample is None or sample.image is None:
        return False
    label = sample.label(file)
    rows.add(sample.image.name, sample.image.offset, sample.image.size, label)
    return label != NO_LABEL


def split_name(name: bytes) -> tuple[bytes | None, bytes]:
    """Key and extension: the file's name ends at its first dot. No key where it begins with that dot."""
    slash = name.rfind(b"/") + 1
    dot = name.find(b".", slash)
    if dot < 0:
        return name, b""
    return (None if dot == slash else name[:dot]), name[dot + 1 :].lower()


def idx_of(path: bytes) -> bytes | None:
    """What `wds2idx` or the like has left beside a shard."""
    return beside(path, (b".tar",), _MOST_IDX)


def _listed(idx: bytes, file: ShardFile) -> list[Member] | None:
    """The members that an index lists, or None where it is none of this shard."""
    version, _, rest = idx.partition(b"\n")
    if version.split(b" ")[0] != b"v1.2":  # older ones have no names
        return None
    found = []
    for line in rest.splitlines():
        words = line.split(b" ")
        if len(words) % 4:  # a name with a space
            return None
        for at in range(0, len(words), 4):
            offset, size = _whole(words[at + 1]), _whole(words[at + 2])
            if offset == NO_LABEL or size == NO_LABEL:
                return None
            found.append(Member(words[at + 3], offset, size, "file"))
    in_order = all(one.offset + one.size <= two.offset for one, two in pairwise(found))
    if not found or not in_order or not all(is_member(file, m.offset, m.size) for m in (found[0], found[-1])):
        return None
    if version.split(b" ")[1:] != [b"%d" % (rest.count(b"\n") + (not rest.endswith(b"\n")))]:
        return None
    return found if is_end(file, -(-(found[-1].offset + found[-1].size) // 512) * 512) else None


def _whole(text: bytes) -> int:
    """A whole number of at most 18 digits, or NO_LABEL."""
    digits = text.strip()
    return int(digits) if 0 < len(digits) <= 18 and not digits.strip(b"0123456789") else NO_LABEL
