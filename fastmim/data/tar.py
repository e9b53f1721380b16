"""The members of a tar file, from its headers alone. Nothing is ever extracted: names are words, whatever they say.

Reads ustar, GNU (long names) and pax (path, size) headers, each checked against its checksum. Where a header cannot be
right the walk ends: what follows cannot be trusted.
"""

from collections.abc import Iterator
from typing import NamedTuple

from fastmim.data.shard_file import ShardError, ShardFile

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_MOST_ZEROS = 1 << 20  # bytes of zeros after which nothing more is expected
_MOST_NAME = 1 << 16
_MOST_PAX = 1 << 20
_FILE, _FOLDER, _NO_DATA = b"0\x007", b"5", b"123456"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}


class Member(NamedTuple):
    """One entry. `offset` is where its data begins."""

    name: bytes
    offset: int
    size: int
    kind: str  # file, folder or other: links, devices and what else is no file


def members(file: ShardFile) -> Iterator[Member]:
    """Every member, in order; several archives one after the other count as one.

    Raises:
        ShardError: after the last good member, where a header is wrong or the file is cut off.
    """
    if file.size >= 2 and (kind := _COMPRESSED.get(file.at(0, 2))):
        raise ShardError(0, f"compressed with {kind}, which has no random access (decompress it first)")
    offset, zeros = 0, 0
    name: bytes | None = None  # by an extension header, for the member after it
    size: int | None = None
    sparse = False
    while offset + _BLOCK <= file.size and zeros < _MOST_ZEROS:
        header = file.at(offset, _BLOCK)
        if header == _ZEROS:
            zeros += _BLOCK
            offset += _BLOCK
            continue
        if not _is_header(header):
            if zeros:  # the archive has ended; what tools leave behind it means nothing
                return
            raise ShardError(offset, "a header with a wrong checksum")
        zeros = 0
        kind_byte = header[156:157]
        own = _number(header[124:136], offset)
        start = offset + _BLOCK
        if kind_byte in b"LKxg":
            payload = _extension(file, offset, own, _MOST_PAX if kind_byte in b"xg" else _MOST_NAME)
            if kind_byte == b"L":
                name = payload.split(b"\0", 1)[0]
            elif kind_byte == b"x":
                records = _pax(payload, offset)
                name = records.get(b"path", name)
                sparse = any(key.startswith(b"GNU.sparse") for key in records)
                if b"size" in records:
                    size = _decimal(records[b"size"], offset)
            offset = start + _padded(own)
            continue
        member = Member(_name(header) if name is None else name, start, own if size is None else size, "other")
        if kind_byte in _FOLDER or (kind_byte == b"\0" and member.name.endswith(b"/")):
            member = member._replace(kind="folder")
        elif kind_byte in _FILE and not sparse:
            member = member._replace(kind="file")
        held = 0 if kind_byte in _NO_DATA else member.size
        if start + held > file.size:
            raise ShardError(offset, f"cut off: a member of {held:,} bytes, {file.size - start:,} left")
        yield member
        name, size, sparse = None, None, False
        offset = start + _padded(held)
    if not zeros:
        raise ShardError(min(offset, file.size), "no end mark: probably cut off")


def is_end(file: ShardFile, offset: int) -> bool:
    """Whether a tar file may end at `offset`: there is nothing, or zeros."""
    left = file.size - offset
    return left <= 0 or not file.at(offset, min(left, _BLOCK)).strip(b"\0")


def is_member(file: ShardFile, offset: int, size: int) -> bool:
    """Whether a header that announces `size` bytes stands before `offset`."""
    if offset < _BLOCK or offset % _BLOCK or offset + size > file.size:
        return False
    header = file.at(offset - _BLOCK, _BLOCK)
    try:
        return _is_header(header) and _number(header[124:136], offset) == size
    except ShardError:
        return False


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _is_header(header: bytes) -> bool:
    try:
        stated = _number(header[148:156], 0)
    except ShardError:
        return False
    counted = header[:148] + b"        " + header[156:]
    total = sum(counted)
    return stated == total or stated == total - 256 * sum(byte > 127 for byte in counted)  # some sum signed bytes


def _number(field: bytes, offset: int) -> int:
    """Octal text, or binary as GNU has it for what does not fit."""
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise ShardError(offset, "a negative number in a header")
        return int.from_bytes(bytes([field[0] & 0x3F]) + field[1:], "big")
    text = field.split(b"\0", 1)[0].strip(b" ")
    if text.strip(b"01234567"):
        raise ShardError(offset, "a header with a number that is none")
    return int(text or b"0", 8)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        return prefix + b"/" + name if prefix else name
    return name


def _extension(file: ShardFile, offset: int, size: int, most: int) -> bytes:
    if size > most:
        raise ShardError(offset, f"an extension header of {size:,} bytes (at most {most:,} are read)")
    try:
        return file.at(offset + _BLOCK, size)
    except ShardError as error:
        raise ShardError(offset, error.reason) from error


def _pax(payload: bytes, offset: int) -> dict[bytes, bytes]:
    """Records of "LENGTH KEY=VALUE\\n"."""
    records = {}
    at = 0
    while at < len(payload) and payload[at]:
        space = payload.find(b" ", at, at + 9)
        end = at + _decimal(payload[at : max(at, space)], offset)
        key, equals, value = payload[space + 1 : end - 1].partition(b"=")
        if not space < end <= len(payload) or payload[end - 1 : end] != b"\n" or not equals:
            raise ShardError(offset, "a pax header that cannot be read")
        records[key] = value
        at = end
    return records


def _decimal(text: bytes, offset: int) -> int:
    if not text or len(text) > 19 or text.strip(b"0123456789"):
        raise ShardError(offset, "a pax header with a number that is none")
    return int(text)
