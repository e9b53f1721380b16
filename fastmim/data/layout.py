"""What `data.root` is: a folder of images, a list of them, tar shards or TFRecord files; and which are for training.

Shards may be given as a folder, as a single file, or as a pattern: `train-{000000..000012}.tar`, `{train,extra}.tar`.
The held-out part is that of folders (`train` beside `val`), or of names: `train-00000-of-01024` beside
`validation-00000-of-00128`.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from fastmim.data.config import DataConfig
from fastmim.data.errors import DataError, printable
from fastmim.data.listing import HELD_OUT, IMAGES, files_under, find_splits

TAR = re.compile(rb"\.tar\Z", re.IGNORECASE)
TFRECORD = re.compile(rb"(\.tfrecords?|(\.tfrecords?)?-\d{5}-of-\d{5})\Z", re.IGNORECASE)
PACKED = re.compile(rb"(\.tgz|\.tar\.(gz|bz2|xz|zst)|\.tfrecords?\.gz|-\d{5}-of-\d{5}\.gz)\Z", re.IGNORECASE)
_SHARDS = {"webdataset": TAR, "tfrecord": TFRECORD}
_FILES = {**_SHARDS, "list": re.compile(rb"\.(txt|lst)\Z", re.IGNORECASE)}
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_BRACES = re.compile(r"\{([^{}]*)\}")
_MOST_SHARDS = 1_000_000
_OF = re.compile(rb"(.*-)(\d{5})(-of-)(\d{5})\Z", re.DOTALL)
_PART = re.compile(rb"(?:^|[-_.])(train|val|valid|validation|test)(?=[-_.\d]|$)", re.IGNORECASE)


@dataclass
class ShardFiles:
    """Shards in the order in which their samples count.

    root: as it was asked for; base: the folder that `names` are relative to.
    """

    root: Path
    base: Path
    names: list[bytes]


def kind_of(cfg: DataConfig) -> str:
    """digits, folder, list, webdataset or tfrecord: what `cfg` asks for, else what its root looks like.

    Raises:
        DataError: a root that cannot be, or tar and TFRecord files side by side.
    """
    if cfg.source is not None:
        return cfg.source
    if cfg.root is None:
        return "digits"
    check_root(cfg.root, cfg.source)
    root = cfg.root.expanduser()
    if not root.is_dir():
        names = [os.fsencode(path.name) for path in _expanded(root)]
        return next((kind for kind, wanted in _FILES.items() if all(wanted.search(name) for name in names)), "folder")
    splits = find_splits(root)
    top = os.fsencode(splits[0] if splits else root)
    found: set[str] = set()
    for name in files_under(top, lambda name: bool(IMAGES.search(name) or TAR.search(name) or TFRECORD.search(name))):
        if IMAGES.search(name):
            return "folder"
        found.add("webdataset" if TAR.search(name) else "tfrecord")
    if len(found) == 2:
        raise DataError(
            f"data.root: {printable(str(root))} holds both tar shards and TFRecord files; "
            "say which to read with --data.source webdataset or tfrecord."
        )
    return found.pop() if found else "folder"


def check_root(root: Path, source: str | None = None) -> None:
    """Raise DataError for a root that is an address, a command, nowhere, or a file that `source` (None: any) cannot
    read. Lists nothing."""
    text = str(root)
    scheme = _URL.match(text)
    if scheme and (scheme[0] == "pipe:" or not root.exists()):
        if scheme[0] == "pipe:":
            raise DataError(f"data.root: {printable(text)} is a command; commands are never run. Give files.")
        raise DataError(
            f"data.root: {printable(text)} is an address, but only files are read: "
            "download the shards first, or mount the place as a folder."
        )
    root = root.expanduser()
    if not root.exists() and not _BRACES.search(str(root)):
        raise DataError(f"data.root: {printable(str(root))} does not exist.")
    name = os.fsencode(root.name)
    if (
        root.is_file()
        and source not in _FILES
        and not (source is None and any(f.search(name) for f in _FILES.values()))
    ):
        packed = ": it is compressed, which has no random access; decompress it" if PACKED.search(name) else ""
        raise DataError(
            f"data.root: {printable(str(root))} is a file, not a folder of images, nor a .txt list of them, nor a .tar "
            f"or .tfrecord shard"
            f"{packed}."
        )


def find_shards(root: Path, kind: str) -> tuple[ShardFiles, ShardFiles | None]:
    """The shards of `kind` to train on, and the held-out ones where there are any.

    Raises:
        DataError: none, or files that are no shards of this kind.
    """
    check_root(root, kind)
    given, root = root, root.expanduser()
    if not root.is_dir():
        return _given(given, _expanded(root), kind), None
    splits = find_splits(root)
    if splits:
        train, held_out = (_listed(part, kind) for part in splits)
        return train, held_out
    return _by_name(_listed(root, kind))


def _listed(folder: Path, kind: str) -> ShardFiles:
    base = folder.absolute()
    names = list(files_under(os.fsencode(base), lambda name: bool(_SHARDS[kind].search(name))))
    if not names:
        packed = next(files_under(os.fsencode(base), lambda name: bool(PACKED.search(name))), None)
        if packed is not None:
            raise DataError(
                f"data.root: {printable(os.fsdecode(packed))} in {printable(str(folder))} is compressed, which has no "
                "random access: decompress it (the images inside are compressed anyway)."
            )
        what = ".tar files" if kind == "webdataset" else ".tfrecord files (or names like train-00000-of-00012)"
        raise DataError(f"data.root: no {what} under {printable(str(folder))}.")
    return ShardFiles(folder, base, _complete(names))


def _given(root: Path, paths: list[Path], kind: str) -> ShardFiles:
    for path in paths:
        if not _SHARDS[kind].search(os.fsencode(path.name)) and PACKED.search(os.fsencode(path.name)):
            raise DataError(
                f"data.root: {printable(str(path))} is compressed, which has no random access: decompress it."
            )
    paths = [path.absolute() for path in paths]
    if not any(path.exists() for path in paths):
        raise DataError(f"data.root: none of the {len(paths)} files of {printable(str(root))} exists.")
    base = Path(os.path.commonpath([path.parent for path in paths]))
    return ShardFiles(root, base, [os.fsencode(path.relative_to(base)) for path in paths])


def _expanded(root: Path) -> list[Path]:
    """Every file that a pattern of braces stands for; a file that exists stands for itself."""
    if root.exists():
        return [root]
    done, todo = [], [str(root)]
    while todo:
        text = todo.pop()
        braces = _BRACES.search(text)
        if braces is None:
            done.append(Path(text))
        else:
            words = _alternatives(braces[1], root)
            todo.extend(text[: braces.start()] + word + text[braces.end() :] for word in reversed(words))
        if len(done) + len(todo) > _MOST_SHARDS:
            raise DataError(f"data.root: {printable(str(root))} stands for more than {_MOST_SHARDS:,} files.")
    return done


def _alternatives(inside: str, root: Path) -> list[str]:
    if ".." not in inside:
        return inside.split(",")
    first, _, last = inside.partition("..")
    if not (first.isascii() and first.isdigit() and last.isascii() and last.isdigit() and int(first) <= int(last)):
        raise DataError(
            f"data.root: {{{inside}}} in {printable(str(root))} is no range of whole numbers, "
            "smallest first, as {000000..000012} is."
        )
    if int(last) - int(first) >= _MOST_SHARDS:
        raise DataError(f"data.root: {printable(str(root))} stands for more than {_MOST_SHARDS:,} files.")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]


def _complete(names: list[bytes]) -> list[bytes]:
    """`names` and those that names like "train-00003-of-00012" say are missing, in order."""
    families: dict[tuple[bytes, bytes], set[int]] = {}
    for name in names:
        if match := _OF.match(name):
            families.setdefault((match[1], match[4]), set()).add(int(match[2]))
    missing = [
        b"%b%05d-of-%b" % (stem, number, total)
        for (stem, total), there in families.items()
        for number in sorted(set(range(int(total))) - there)
    ]
    return sorted([*names, *missing]) if missing else names


def _by_name(shards: ShardFiles) -> tuple[ShardFiles, ShardFiles | None]:
    """Training and held-out shards by words in their names, where each shard has such a word."""
    parts: dict[str, list[bytes]] = {}
    for name in shards.names:
        word = _PART.search(name.rpartition(b"/")[2])
        if word is None:
            return shards, None
        parts.setdefault(word[1].decode().lower(), []).append(name)
    held_out = next((word for word in HELD_OUT if word in parts), None)
    if "train" not in parts or held_out is None:
        return shards, None
    train, other = (ShardFiles(shards.root, shards.base, parts[word]) for word in ("train", held_out))
    return train, other
