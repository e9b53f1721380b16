"""Where every sample of a shard lies: made by one pass over headers, then kept in a file.

The file lies beside the shard (`.NAME.fastmim-index`) or, where that folder cannot be written, in
`$XDG_CACHE_HOME/fastmim/shards`. It holds the shard's size and time of change, and is made anew when these differ, or
when it is damaged. Like everything beside a shard it may come from strangers: it is checked before it is used.
"""

import contextlib
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastmim.data.errors import printable
from fastmim.data.shard_file import ShardError, ShardFile

NO_LABEL = -1

_log = logging.getLogger("fastmim.data")
_MAGIC = b"fastmim shard index 1\n"
_MOST_HEADER = 1 << 16
_MOST_WARNINGS = 20
_MOST_KEY = 1024
_THREADS = 16  # mostly waiting for the disk
_SHOWN_FROM = 9  # fewer shards than this are indexed without a word
_SAY_SECONDS = 10.0


@dataclass
class ShardIndex:
    """The samples of one shard: offset, size, label (NO_LABEL: none) and key of each, and what was wrong with it.

    keys: all keys, one after the other; ends: [n], where each ends.
    damaged: samples were lost.
    """

    size: int
    mtime_ns: int
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int64]
    keys: bytes
    ends: NDArray[np.int64]
    warnings: list[str] = field(default_factory=list)
    damaged: bool = False

    def __len__(self) -> int:
        return len(self.offsets)

    def key(self, sample: int) -> bytes:
        return self.keys[self.ends[sample - 1] if sample else 0 : self.ends[sample]]

    def without(self, keys: set[bytes]) -> "ShardIndex":
        """This index less the samples of these keys."""
        left = [sample for sample in range(len(self)) if self.key(sample) not in keys]
        names = [self.key(sample) for sample in left]
        return replace(
            self,
            offsets=self.offsets[left],
            sizes=self.sizes[left],
            labels=self.labels[left],
            keys=b"".join(names),
            ends=np.cumsum([len(name) for name in names], dtype=np.int64),
        )


class Rows:
    """A ShardIndex in the making."""

    def __init__(self, file: ShardFile) -> None:
        self._file = file
        self._rows: list[tuple[int, int, int]] = []
        self._keys: list[bytes] = []
        self.warnings: list[str] = []
        self.damaged = False

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, key: bytes, offset: int, size: int, label: int) -> None:
        self._rows.append((offset, size, label if 0 <= label < 2**62 else NO_LABEL))
        self._keys.append(_plain(key))

    def warn(self, words: str, damaged: bool = False) -> None:
        self.damaged |= damaged
        if len(self.warnings) < _MOST_WARNINGS:
            self.warnings.append(words[:500])

    def fault(self, error: ShardError) -> None:
        self.warn(f"damaged at byte {error.offset:,} ({error.reason}): the rest of it is left out", damaged=True)

    def index(self) -> ShardIndex:
        offsets, sizes, labels = np.array(self._rows, dtype=np.int64).reshape(-1, 3).T
        ends = np.cumsum([len(key) for key in self._keys], dtype=np.int64)
        return ShardIndex(
            self._file.size,
            self._file.mtime_ns,
            offsets,
            sizes,
            labels,
            b"".join(self._keys),
            ends,
            self.warnings,
            self.damaged,
        )


Build = Callable[[bytes, ShardFile], ShardIndex]


def index_shards(paths: Sequence[bytes], kind: str, build: Build, name: str) -> list[ShardIndex]:
    """The index of every shard, read where there is a good one, built where not; several at a time.

    A shard that cannot be opened has an empty one. `kind` tells the indexes of different builders apart.
    """
    found: list[ShardIndex | None] = [None] * len(paths)
    with ThreadPoolExecutor(_THREADS) as pool:
        for number, index in enumerate(pool.map(lambda path: _kept(path, kind), paths)):
            found[number] = index
        todo = [number for number, index in enumerate(found) if index is None]
        # Processes that start together begin at different shards and find what the others have done.
        rank, world = (int(os.environ.get(key, default)) for key, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        turn = len(todo) * rank // max(1, world)
        todo = todo[turn:] + todo[:turn]
        built = pool.map(lambda number: _index_of(paths[number], kind, build), todo)
        for number, index in zip(todo, _watched(built, len(todo), name, rank == 0), strict=True):
            found[number] = index
    return [index for index in found if index is not None]


def _watched(built: Iterable[ShardIndex], total: int, name: str, shown: bool) -> Iterator[ShardIndex]:
    if total < _SHOWN_FROM or not shown:
        yield from built
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(built, "indexing shards", total, console=Console(stderr=True), transient=True)
        return
    said = time.monotonic()
    for done, index in enumerate(built, 1):
        if time.monotonic() - said > _SAY_SECONDS:
            said = time.monotonic()
            _log.info("indexing %s: %d of %d shards so far", name, done, total)
        yield index


def _index_of(path: bytes, kind: str, build: Build) -> ShardIndex:
    index = _kept(path, kind)
    if index is not None:
        return index
    try:
        file = ShardFile(path)
        index = build(path, file)
    except (OSError, ShardError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        words = "missing" if isinstance(error, FileNotFoundError) else f"unreadable ({reason})"
        none = np.zeros(0, dtype=np.int64)
        return ShardIndex(0, 0, none, none, none, b"", none, [f"{words}: it is left out"], True)
    _keep(path, kind, index)
    return index


def _places(path: bytes) -> list[Path]:
    """Where the index of a shard may lie."""
    shard = Path(os.fsdecode(path))
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    digest = hashlib.sha256(os.path.realpath(path)).hexdigest()[:32]
    return [shard.parent / f".{shard.name}.fastmim-index", caches / "fastmim" / "shards" / digest]


def _kept(path: bytes, kind: str) -> ShardIndex | None:
    """An index of the shard as it is now, if there is a good one."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    for place in _places(path):
        try:
            index = _decoded(place.read_bytes(), kind)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            _log.warning("index %s is made anew (%s)", printable(str(place)), error)
            continue
        if (index.size, index.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return index
    return None


def _keep(path: bytes, kind: str, index: ShardIndex) -> None:
    reason = ""
    for place in _places(path):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _write(place, _encoded(index, kind))
            return
        except OSError as error:
            reason = error.strerror or str(error)
    _log.warning("the index of %s cannot be kept (%s): it is made at each start", printable(os.fsdecode(path)), reason)


def _write(place: Path, content: bytes) -> None:
    file, name = tempfile.mkstemp(dir=place.parent, prefix=".fastmim-index-")
    try:
        with open(file, "wb") as stream:
            stream.write(content)
            os.fchmod(file, 0o644)
        os.replace(name, place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _encoded(index: ShardIndex, kind: str) -> bytes:
    header = {
        "kind": kind,
        "size": index.size,
        "mtime_ns": index.mtime_ns,
        "samples": len(index),
        "warnings": index.warnings,
        "damaged": index.damaged,
    }
    columns = [column.astype("<i8").tobytes() for column in (index.offsets, index.sizes, index.labels, index.ends)]
    body = b"".join([_MAGIC, json.dumps(header).encode(), b"\n", *columns, index.keys])
    return body + zlib.crc32(body).to_bytes(4, "little")


def _decoded(content: bytes, kind: str) -> ShardIndex:
    """The index in a file, or ValueError."""
    if not content.startswith(_MAGIC):
        raise ValueError("no index of this version")
    if zlib.crc32(content[:-4]) != int.from_bytes(content[-4:], "little"):
        raise ValueError("damaged")
    line = content.find(b"\n", len(_MAGIC), len(_MAGIC) + _MOST_HEADER)
    header = json.loads(content[len(_MAGIC) : max(line, 0)])
    if header["kind"] != kind:
        raise ValueError(f"an index of {header['kind']!r:.20}, not of {kind}")
    count, size, mtime_ns = (header[key] for key in ("samples", "size", "mtime_ns"))
    if not all(isinstance(number, int) and number >= 0 for number in (count, size, mtime_ns)):
        raise ValueError("numbers that cannot be")
    keys = line + 1 + 4 * 8 * count
    if not line < keys <= len(content) - 4:
        raise ValueError("another length than it says")
    offsets, sizes, labels, ends = np.frombuffer(content, "<i8", 4 * count, line + 1).astype(np.int64).reshape(4, count)
    index = ShardIndex(size, mtime_ns, offsets, sizes, labels, content[keys:-4], ends)
    index.warnings = [
        _plain(str(words).encode("utf-8", "replace")).decode("utf-8", "replace")
        for words in header["warnings"][:_MOST_WARNINGS]
    ]
    index.damaged = bool(header["damaged"])
    good = (offsets >= 0) & (offsets <= size) & (sizes >= 0) & (sizes <= size - offsets) & (labels >= NO_LABEL)
    steps = np.diff(ends, prepend=0)
    if not good.all() or (steps < 0).any() or (ends[-1] if count else 0) != len(index.keys):
        raise ValueError("places that are not in the shard")
    return index


def _plain(key: bytes) -> bytes:
    """`key` on one line, in bounds: it is shown and listed."""
    if min(key, default=32) < 32 or 127 in key:
        key = b"".join(b"\\x%02x" % byte if byte < 32 or byte == 127 else bytes([byte]) for byte in key[:_MOST_KEY])
    return key[:_MOST_KEY]
