"""Find unreadable images before a run does: `python -m fastmim.data.verify DIR` decodes every one, in parallel.

DIR is what training gets as `data.root`: a folder of images, a list of them, or shards; with a `train` folder beside
`val`, both are looked at. Prints what is wrong and how often, and writes the names of the bad images, one a line and
relative to the folder that is read, to `.fastmim-exclude.txt` in it; training leaves those out. `--out FILE` writes
elsewhere (`-`: to the terminal only). Exit code 0: all are readable; 3: some are not, or shards are damaged; 2: DIR
cannot be used.
"""

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from fastmim.data.config import DataConfig
from fastmim.data.errors import DataError, printable
from fastmim.data.exclusion import EXCLUDE
from fastmim.data.file_list import FileListSource
from fastmim.data.folder import FolderSource
from fastmim.data.image_files import ImageFiles
from fastmim.data.layout import find_shards, kind_of
from fastmim.data.listing import find_splits
from fastmim.data.shards import ShardSource
from fastmim.data.sources import source_of_shards

_CHUNK = 64  # images that a process is given at a time
_source: ImageFiles | ShardSource | None = None  # of a worker process


def unreadable(source: ImageFiles | ShardSource, workers: int | None = None) -> Iterator[list[tuple[int, str]]]:
    """For each chunk of images in order, those that cannot be decoded: (index, reason). `workers` None: one a CPU."""
    chunks = [range(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK)]
    with ProcessPoolExecutor(workers, get_context("spawn"), _receive, (source,)) as pool:
        yield from pool.map(_decode_all, chunks)


def _receive(source: ImageFiles | ShardSource) -> None:
    global _source
    _source = source


def _decode_all(indices: Sequence[int]) -> list[tuple[int, str]]:
    assert _source is not None
    bad = []
    for index in indices:
        try:
            _source.load(index)
        except Exception as error:  # readers of damaged files raise anything
            bad.append((index, f"{type(error).__name__}: {error}"))
    return bad


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastmim.data.verify", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "root", metavar="DIR", type=Path, help="folder of images, list of them, or shards, as data.root"
    )
    parser.add_argument("--out", default=None, help=f"where the names go (default: DIR/{EXCLUDE}; -: nowhere)")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one per CPU)")
    parser.add_argument("--max_pixels", type=int, default=DataConfig.max_pixels, help="larger images count as bad")
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers must be at least 1; got {options.workers}")
    logging.getLogger("fastmim.data").addHandler(logging.NullHandler())  # what it says is printed below
    try:
        sources = _sources(DataConfig(root=options.root, max_pixels=options.max_pixels))
    except DataError as error:
        print(error, file=sys.stderr)
        return error.code
    reasons: list[str] = []
    names: dict[Path, list[bytes]] = {}
    for source in sources:
        bad = _watched(source, options.workers)
        for index, reason in bad:
            print(f"{printable(source.path(index))}: {reason}")
        reasons += [reason for _, reason in bad]
        names.setdefault(source.base, []).extend(source.name_of(index) for index, _ in bad)
    damaged = _report_shards(sources)
    print(f"{sum(map(len, sources)):,} images, {len(reasons):,} unreadable")
    for kind, count in Counter(reason.partition(":")[0] for reason in reasons).most_common():
        print(f"  {count:6,}  {kind}")
    if options.out is None:
        for base, listed in names.items():
            _write(base / EXCLUDE, listed)
    elif options.out != "-":
        _write(Path(options.out), [name for listed in names.values() for name in listed])
    return 3 if reasons or damaged else 0


def _sources(cfg: DataConfig) -> Sequence[ImageFiles | ShardSource]:
    """Everything that training or evaluation would read, excluded or not."""
    kind = kind_of(cfg)
    assert cfg.root is not None
    if kind == "folder":
        roots = find_splits(cfg.root) or (cfg.root,)
        return [FolderSource(replace(cfg, root=root), excluding=False) for root in roots]
    if kind == "list":
        return [FileListSource(cfg, excluding=False)]
    parts = find_shards(cfg.root, kind)
    return [source_of_shards(kind)(cfg, part, excluding=False) for part in parts if part is not None]


def _report_shards(sources: Sequence[ImageFiles | ShardSource]) -> int:
    """Print what is wrong with shards; how many have lost samples."""
    shards = [source for source in sources if isinstance(source, ShardSource)]
    for source in shards:
        for name, words in source.troubles:
            print(f"{name}: {words}")
    damaged = sum(source.damaged for source in shards)
    if damaged:
        print(f"{damaged:,} shards damaged")
    return damaged


def _watched(source: ImageFiles | ShardSource, workers: int | None) -> list[tuple[int, str]]:
    from rich.console import Console
    from rich.progress import track

    chunks = (len(source) + _CHUNK - 1) // _CHUNK
    found = track(unreadable(source, workers), "decoding", chunks, console=Console(stderr=True))
    return [pair for chunk in found for pair in chunk]


def _write(path: Path, bad: list[bytes]) -> None:
    if not bad and not path.exists():
        return
    path.write_bytes(b"".join(name + b"\n" for name in bad))
    print(f"written: {printable(str(path))}")


if __name__ == "__main__":
    sys.exit(main())
