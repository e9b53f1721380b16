"""What the smaller commands (evaluate, export) share: one positional word, then --key value, into a dataclass."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from jsonargparse import ArgumentParser

from fastmim.config import ConfigError, build
from fastmim.words import hide_groups, key_types, split_words, typed_value

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
    hide_groups(parser)
    rest = list(argv)
    first = rest.pop(0) if rest and not rest[0].startswith("-") else None
    words = split_words(rest)
    if "help" in words:
        parser.print_help()
        raise SystemExit(0)
    if first is None:
        raise ConfigError(f"{word} is missing: {usage}")
    types = key_types(cls)
    values = parser.get_defaults()
    for key, text in words.items():
        values[key] = typed_value(parser, "", key, text, types)
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
