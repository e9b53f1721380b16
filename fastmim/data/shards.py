"""Images inside shards: large files with many samples each, read at any place, so that order and resume are as ever.

A shard that is missing, damaged or cut off costs what is lost of it and a warning that says where; what remains is
used. Samples that cannot be read later on are replaced and counted, as unreadable files are.
"""

import io
import logging
import os
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from fastmim.data.config import DataConfig
from fastmim.data.decode import open_image
from fastmim.data.errors import DataError, printable
from fastmim.data.exclusion import excluded
from fastmim.data.layout import ShardFiles
from fastmim.data.shard_file import ShardFile
from fastmim.data.shard_index import NO_LABEL, ShardIndex, index_shards
from fastmim.data.sources import Source

_BYTES_PER_PIXEL = 8  # as for files: no honest image is larger
_MOST_OPEN = 64


class ShardSource(Source):
    """The images in `shards`; `classes` prescribes the labels instead of deriving them.

    `excluding` False reads what is on the list of excluded ones too.

    Attributes:
        base: the folder that names are relative to.
        troubles: what was found wrong with shards: (name, words); damaged: how many shards have lost samples.
    """

    kind = "shards"
    wanted_label = "a whole number for each image"

    def __init__(
        self, cfg: DataConfig, shards: ShardFiles, classes: list[str] | None = None, excluding: bool = True
    ) -> None:
        super().__init__(cfg)
        self.name = f"{self.kind} {printable(str(shards.root))}"
        self.max_pixels = cfg.max_pixels
        self.base = shards.base
        self._names = shards.names
        self._indices = index_shards(
            [self._path(shard) for shard in range(len(shards.names))], self.kind, self.index, self.name
        )
        self.damaged = sum(index.damaged for index in self._indices)
        self.troubles = [
            (printable(os.fsdecode(self._path(shard))), words)
            for shard, index in enumerate(self._indices)
            for words in index.warnings
        ]
        self.notes += tuple((logging.WARNING, f"shard {name}: {words}") for name, words in self.troubles)
        count = sum(len(index) for index in self._indices)
        if excluding:
            self._exclude(cfg)
        self._ends = np.cumsum([len(index) for index in self._indices], dtype=np.int64)
        if not count:
            what = " All are damaged." if self.damaged == len(self._names) else ""
            first = " For example {}: {}.".format(*self.troubles[0]) if self.troubles else ""
            raise DataError(f"data.root: no images in the {len(self._names)} shards of {self.name}.{what}{first}")
        self._label(classes)

    @staticmethod
    def index(path: bytes, file: ShardFile) -> ShardIndex:
        """The samples of the shard `file`, which lies at `path`."""
        raise NotImplementedError

    def image_bytes(self, file: ShardFile, offset: int, size: int) -> bytes:
        """The encoded image of a sample, from where its index says it lies."""
        return file.read(offset, size)

    def _exclude(self, cfg: DataConfig) -> None:
        exclusion = excluded(self.base, cfg.exclude)
        if exclusion.names is None:
            return
        shard_of = {name: number for number, name in enumerate(self._names)}
        keys: dict[int, set[bytes]] = {}
        for line in exclusion.names:
            for at in (at for at, byte in enumerate(line) if byte == ord("/")):
                if line[:at] in shard_of:
                    keys.setdefault(shard_of[line[:at]], set()).add(line[at + 1 :])
        before = sum(len(index) for index in self._indices)
        for shard, names in keys.items():
            self._indices[shard] = self._indices[shard].without(names)
        self.notes += exclusion.notes(before, sum(len(index) for index in self._indices))

    def _label(self, classes: list[str] | None) -> None:
        numbers = np.concatenate([index.labels for index in self._indices])
        without = np.flatnonzero(numbers == NO_LABEL)
        if len(without):
            lacking = printable(os.fsdecode(self.name_of(int(without[0]))))
            self.unlabelled = (
                f"has {len(without):,} images of {len(numbers):,} without a label (the first is {lacking}); "
                f"k-NN and linear probe need {self.wanted_label}"
            )
            if len(without) < len(numbers):
                words = f"{self.name} {self.unlabelled.partition(';')[0]}: labels are not used"
                self.notes += ((logging.WARNING, words),)
            return
        found, labels = np.unique(numbers, return_inverse=True)
        if len(found) < 2 and classes is None:
            self.unlabelled = f"has labels of one class only; k-NN and linear probe need {self.wanted_label}"
            return
        self.label_by([str(number) for number in found.tolist()], labels, classes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _path(self, shard: int) -> bytes:
        return os.path.join(os.fsencode(self.base), self._names[shard])

    def _place(self, index: int) -> tuple[int, int]:
        """Shard, and sample in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def path(self, index: int) -> str:
        return os.fsdecode(os.path.join(os.fsencode(self.base), self.name_of(index)))

    def name_of(self, index: int) -> bytes:
        """Shard, relative to `base`, and key of image `index` in it."""
        shard, sample = self._place(index)
        return self._names[shard] + b"/" + self._indices[shard].key(sample)

    def open(self, index: int) -> Image.Image:
        return open_image(io.BytesIO(self.encoded(index)), self.max_pixels)

    def encoded(self, index: int) -> bytes:
        """The bytes of image `index` as they are stored.

        Raises:
            ShardError, OSError, ValueError: they cannot be read, or cannot be an image.
        """
        shard, sample = self._place(index)
        table = self._indices[shard]
        offset, size = int(table.offsets[sample]), int(table.sizes[sample])
        if size > _BYTES_PER_PIXEL * self.max_pixels:
            raise ValueError(f"{size:,} bytes, more than {_BYTES_PER_PIXEL} for each of data.max_pixels")
        stamp = table.size, table.mtime_ns
        try:
            return self.image_bytes(_opened(self._path(shard), *stamp), offset, size)
        except OSError:  # a server that has forgotten the file: once more with a new handle
            _opened.cache_clear()
            return self.image_bytes(_opened(self._path(shard), *stamp), offset, size)


@lru_cache(maxsize=_MOST_OPEN)
def _opened(path: bytes, size: int, mtime_ns: int) -> ShardFile:
    """The shard as it was when it was indexed; kept open while it is among the last ones used."""
    file = ShardFile(path)
    if (file.size, file.mtime_ns) != (size, mtime_ns):
        raise ValueError("the shard has changed since it was indexed")
    return file


def beside(path: bytes, endings: Sequence[bytes], most: int) -> bytes | None:
    """The content of the `.idx` file beside a shard, where there is one: NAME.idx, NAME without one of `endings`."""
    stems = [path] + [path[: -len(ending)] for ending in endings if path.lower().endswith(ending)]
    for stem in stems:
        try:
            file = ShardFile(stem + b".idx")
            return file.read(0, file.size) if file.size <= most else None
        except (OSError, ValueError):
            continue
    return None
