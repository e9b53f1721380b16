"""Find unreadable images before a run does: `python -m fastmim.data.verify DIR` decodes every one, in parallel.

Prints what is wrong and how often, and writes the names of the bad files, one a line and relative to DIR, to
`DIR/.fastmim-exclude.txt`; training on DIR leaves those out. `--out FILE` writes elsewhere (`-`: to the terminal only).
Exit code 0: all are readable; 3: some are not; 2: DIR cannot be used.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from fastmim.data.config import DataConfig
from fastmim.data.errors import DataError, printable
from fastmim.data.folder import EXCLUDE, FolderSource

_CHUNK = 64  # images that a process is given at a time
_source: FolderSource | None = None  # of a worker process


def unreadable(source: FolderSource, workers: int | None = None) -> Iterator[list[tuple[int, str]]]:
    """For each chunk of images in order, those that cannot be decoded: (index, reason). `workers` None: one a CPU."""
    chunks = [range(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK)]
    with ProcessPoolExecutor(workers, get_context("spawn"), _receive, (source,)) as pool:
        yield from pool.map(_decode_all, chunks)


def _receive(source: FolderSource) -> None:
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
    parser.add_argument("root", metavar="DIR", type=Path, help="folder of images, searched recursively")
    parser.add_argument("--out", default=None, help=f"where the names go (default: DIR/{EXCLUDE}; -: nowhere)")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one per CPU)")
    parser.add_argument("--max_pixels", type=int, default=DataConfig.max_pixels, help="larger images count as bad")
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers must be at least 1; got {options.workers}")
    try:
        source = FolderSource(DataConfig(root=options.root, max_pixels=options.max_pixels), excluding=False)
    except DataError as error:
        print(error, file=sys.stderr)
        return error.code
    bad = _watched(source, options.workers)
    for index, reason in bad:
        print(f"{printable(source.path(index))}: {reason}")
    print(f"{len(source):,} images, {len(bad):,} unreadable")
    for kind, count in Counter(reason.partition(":")[0] for _, reason in bad).most_common():
        print(f"  {count:6,}  {kind}")
    if options.out != "-":
        _write(options, source, [index for index, _ in bad])
    return 3 if bad else 0


def _watched(source: FolderSource, workers: int | None) -> list[tuple[int, str]]:
    from rich.console import Console
    from rich.progress import track

    chunks = (len(source) + _CHUNK - 1) // _CHUNK
    found = track(unreadable(source, workers), "decoding", chunks, console=Console(stderr=True))
    return [pair for chunk in found for pair in chunk]


def _write(options: argparse.Namespace, source: FolderSource, bad: list[int]) -> None:
    path = options.root / EXCLUDE if options.out is None else Path(options.out)
    if not bad and not path.exists():
        return
    path.write_bytes(b"".join(source.name_of(index) + b"\n" for index in bad))
    print(f"written: {printable(str(path))}")


if __name__ == "__main__":
    sys.exit(main())
