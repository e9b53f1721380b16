"""Where images come from. A source knows its images one by one; it draws nothing and resizes nothing."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastmim.data.config import DataConfig
from fastmim.data.decode import decode
from fastmim.data.errors import DataError
from fastmim.data.layout import find_shards, kind_of
from fastmim.data.listing import find_splits

if TYPE_CHECKING:
    from fastmim.data.shards import ShardSource

_log = logging.getLogger("fastmim.data")
_said: set[str] = set()
_LUMA = (0.299, 0.587, 0.114)


class Source:
    """A numbered set of images. Subclasses fill in what is their own; the settings in `cfg` come first.

    Attributes:
        name: what it is, for logs.
        classes: class names in label order, or None where images have no labels.
        labels: [len] int64, or None.
        in_chans, mean, std: what a model is fed; mean and std have `in_chans` numbers, in [0, 1].
        scale, flip: settings of the random crop that suit these images, or those of `cfg`.
        eval_share: share of the shorter side that the centre crop of evaluation keeps.
        unlabelled: why there are no labels, as the rest of a sentence that begins with `name`.
        notes: what is to be said of these images before they are used: (level of logging, words). See `report`.
        in_memory: reading is so cheap that worker processes cost more than they save.
    """

    name = "source"
    classes: list[str] | None = None
    labels: NDArray[np.int64] | None = None
    natural_chans = 3
    natural_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    natural_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    natural_scale = (0.2, 1.0)
    natural_flip = True
    eval_share = 224 / 256
    in_memory = False
    notes: tuple[tuple[int, str], ...] = ()
    unlabelled = (
        "has no class folders, so its images have no labels to compare with; k-NN and linear probe need "
        "one folder per class, as DIR/cat/1.jpg and DIR/dog/2.jpg"
    )

    def __init__(self, cfg: DataConfig) -> None:
        self.in_chans = cfg.in_chans or self.natural_chans
        self.mean = self._statistic("mean", cfg.mean, self.natural_mean)
        self.std = self._statistic("std", cfg.std, self.natural_std)
        self.scale = self.natural_scale if cfg.scale is None else cfg.scale
        self.flip = self.natural_flip if cfg.flip is None else cfg.flip

    def _statistic(self, key: str, given: tuple[float, ...] | None, natural: tuple[float, ...]) -> tuple[float, ...]:
        if given is not None:
            if len(given) != self.in_chans:
                raise DataError(
                    f"data.{key} has {len(given)} numbers, but images are read with {self.in_chans} "
                    f"channel{'s' if self.in_chans > 1 else ''}."
                )
            return tuple(given)
        if len(natural) == self.in_chans:
            return natural
        if len(natural) == 1:
            return natural * self.in_chans
        return (sum(weight * value for weight, value in zip(_LUMA, natural, strict=True)),)

    def __len__(self) -> int:
        raise NotImplementedError

    def path(self, index: int) -> str:
        """Where image `index` lies: a path that can be opened, or words where there is no file."""
        raise NotImplementedError

    def label(self, index: int) -> int | None:
        """Class number, or None where images have no labels."""
        return None if self.labels is None else int(self.labels[index])

    def label_by(self, found: list[str], numbers: NDArray[np.int64], classes: list[str] | None) -> None:
        """Labels from class `found[numbers[i]]` of image i; `classes` prescribes which number each class has.

        Raises:
            DataError: a class that `classes` does not have.
        """
        self.classes = found if classes is None else classes
        number = {name: label for label, name in enumerate(self.classes)}
        strangers = [name for name in found if name not in number]
        if strangers:
            raise DataError(
                f"data.root: {self.name} has classes that the training images do not have: {', '.join(strangers[:5])}."
            )
        self.labels = np.array([number[name] for name in found], dtype=np.int64)[numbers]

    def open(self, index: int) -> Image.Image:
        """The image, possibly not decoded yet (see fastmim.data.decode)."""
        raise NotImplementedError

    def report(self) -> None:
        """Log the notes, each once a process: those who use the images call it, when logs are written."""
        for level, words in self.notes:
            if words not in _said:
                _said.add(words)
                _log.log(level, words)

    def load(self, index: int) -> Image.Image:
        """The image decoded and upright, "RGB" or "L" by `in_chans`."""
        return decode(self.open(index), self.in_chans)[0]


def create_source(cfg: DataConfig) -> Source:
    """The images that `cfg` asks for.

    Raises:
        DataError: a missing, empty or image-less folder, shards without images, or settings that cannot be; before
            any image is read.
    """
    cfg.check()
    kind = kind_of(cfg)
    if kind == "digits":
        from fastmim.data.digits import DigitsSource

        return DigitsSource(cfg)
    if kind == "folder":
        from fastmim.data.folder import FolderSource

        splits = find_splits(_root(cfg))
        return FolderSource(replace(cfg, root=splits[0]) if splits else cfg)
    if kind == "list":
        from fastmim.data.file_list import FileListSource

        return FileListSource(cfg)
    return source_of_shards(kind)(cfg, find_shards(_root(cfg), kind)[0])


def held_out_source(cfg: DataConfig) -> Source | None:
    """The part of the data that training does not read, where it lies in a folder of its own; else None (`split` then
    makes one). Its labels are numbered like those of `create_source(cfg)`.

    Raises:
        DataError: as `create_source`; or a class in the held-out part that the training part does not have.
    """
    cfg.check()
    kind = kind_of(cfg)
    if kind in ("digits", "list"):
        return None
    if kind == "folder":
        from fastmim.data.folder import FolderSource

        splits = find_splits(_root(cfg))
        if splits is None:
            return None
        train = FolderSource(replace(cfg, root=splits[0]))
        return FolderSource(replace(cfg, root=splits[1]), classes=train.classes)
    shards, held_out = find_shards(_root(cfg), kind)
    if held_out is None:
        return None
    source = source_of_shards(kind)
    return source(cfg, held_out, classes=source(cfg, shards).classes)


def source_of_shards(kind: str) -> "type[ShardSource]":
    """The class that reads shards of `kind`, webdataset or tfrecord."""
    if kind == "webdataset":
        from fastmim.data.webdataset import WebDatasetSource

        return WebDatasetSource
    from fastmim.data.tfrecord import TFRecordSource

    return TFRecordSource


def _root(cfg: DataConfig) -> Path:
    if cfg.root is None:
        raise DataError(f"data.source is {cfg.source}, but data.root is not given: say --data.root DIR.")
    return cfg.root
