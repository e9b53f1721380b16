"""What the smaller commands (evaluate, export) share: one positional word, then --key value, into a dataclass."""

import errno
from argparse import SUPPRESS
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import ArgumentParser

from fastmim.command_line import _typed, _unknown, _words
from fastmim.config import ConfigError, build

__all__ = ["parse_options", "writing"]

Options = TypeVar("Options")


def parse_options(
    cls: type[Options], argv: Sequence[str], *, usage: str, description: str, word: str
) -> tuple[str, Options]:
    """The positional word and the options.

    Args:
        cls: a dataclass; its docstrings are the help.
        usage: after "usage:", such as "python -m fastmim.export RUN [--key value ...]".
        word: what the positional word is, for the message when it is not there.

    Raises:
        ConfigError: no positional word, an unknown key, a wrong type: in one sentence.
        SystemExit: with 0, after --help.
    """
    parser = ArgumentParser(prog=usage.partition(" [")[0], usage=usage, description=description, exit_on_error=False)
    parser.add_class_arguments(cls)
    for action in parser._actions:  # of a group jsonargparse would also read a file; no word of ours does
        if action.help == "Path to a configuration file.":
            action.help = SUPPRESS
    rest = list(argv)
    first = rest.pop(0) if rest and not rest[0].startswith("-") else None
    words = _words(rest)
    if "help" in words:
        parser.print_help()
        raise SystemExit(0)
    if first is None:
        raise ConfigError(f"{word} is missing: {usage}")
    types = _types(cls)
    values = parser.get_defaults()
    for key, text in words.items():
        if key not in types:
            raise ConfigError(_unknown(key, "", types))
        values[key] = _typed(parser, "", key, text, types)
    return first, build(cls, values.as_dict())


@contextmanager
def writing(key: str, path: Path) -> Iterator[None]:
    """A path that cannot be written is the user's mistake; a full disk is not, and passes through."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(f"{key}: {path} cannot be written ({error.strerror})") from None


def _types(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted key and its type."""
    types: dict[str, Any] = {}
    for item in fields(cls):
        types |= (
            _types(item.type, f"{prefix}{item.name}.") if is_dataclass(item.type) else {prefix + item.name: item.type}
        )
    return types
