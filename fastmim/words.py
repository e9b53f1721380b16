"""Words of a command line and values of a file: into typed settings, or one sentence about what is wrong with them."""

import json
import types
import typing
from argparse import SUPPRESS, ArgumentError
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from fastmim.config import ConfigError

__all__ = ["did_you_mean", "hide_groups", "key_types", "split_words", "typed_value"]

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def key_types(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a dataclass and its type."""
    keys: dict[str, Any] = {}
    for item in fields(cls):
        name = f"{prefix}{item.name}"
        keys |= key_types(item.type, f"{name}.") if is_dataclass(item.type) else {name: item.type}
    return keys


def hide_groups(parser: ArgumentParser) -> None:
    """jsonargparse would also read a group of settings from a file (`--data FILE`); no word of ours does."""
    for action in parser._actions:
        if action.help == "Path to a configuration file.":
            action.help = SUPPRESS


def split_words(argv: Sequence[str]) -> dict[str, str | None]:
    """`--key value`, `--key=value` and `--flag` as {key: text or None}; the last one of a key counts."""
    words: dict[str, str | None] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word == "-h":
            word = "--help"
        if not word.startswith("--") or word == "--":
            raise ConfigError(f"{word}: not understood here; options are written --key value, as --epochs 100")
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        text: str | None = value if equals else None
        if not equals and rest and not rest[0].startswith("--") and rest[0] != "-h":
            text = rest.pop(0)
        words[key] = text
    return words


def typed_value(parser: ArgumentParser, where: str, key: str, value: Any, types_of: dict[str, Any]) -> Any:
    """The value of one setting in its type."""
    source = f" (in {where})" if where else ""
    if key not in types_of and not key.startswith("model.kwargs."):
        raise ConfigError(_unknown(key, source, types_of))
    kind = types_of.get(key, Any)
    if (value is None or value == "") and not where:
        if kind is not bool:
            raise ConfigError(f"{key}: needs a value, {_expected(kind)}")
        value = True
    text = value if isinstance(value, str) else json.dumps(value)
    if isinstance(value, str) and _is_numbers(text) and _holds_tuple(kind):
        text = f"[{text}]"
    if isinstance(value, str) and kind == list[str] and not text.startswith("["):
        text = json.dumps([part.strip() for part in text.split(",")])
    try:
        parsed = parser.parse_args([f"--{key}={text}"], defaults=False)
    except ArgumentError:
        raise ConfigError(f"{key}: {value!r} is not {_expected(kind)}{source}") from None
    group, _, inner = key.partition("kwargs.")
    return parsed[f"{group}kwargs"][inner] if inner else parsed[key]


def _unknown(key: str, source: str, types_of: dict[str, Any]) -> str:
    group = [known for known in types_of if known.startswith(f"{key}.")]
    if group:
        return f"{key}: is a group of settings{source}, not a single one: {', '.join(group)}"
    return f"{key}: there is no such setting{source}; {did_you_mean(key, types_of)}--help lists all"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question with the nearest name, or nothing. A forgotten group (mask_ratio) comes before a slip of the hand."""
    leaf = word.rpartition(".")[2]
    names = list(known)
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(names)}
    if leaf in by_leaf:
        return f"did you mean {by_leaf[leaf]}? "
    close = get_close_matches(word, names, 1, 0.6) or [by_leaf[w] for w in get_close_matches(leaf, by_leaf, 1, 0.6)]
    return f"did you mean {close[0]}? " if close else ""


def _expected(kind: Any) -> str:
    """A type in words: "a whole number or null"."""
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        Path: "a path",
        type(None): "null",
    }
    if kind in words:
        return words[kind]
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_expected(part) for part in parts)
    if origin is tuple:
        return (
            f"{len(parts)} numbers with a comma between them"
            if Ellipsis not in parts
            else "numbers with commas between them"
        )
    if origin is list:
        return "names with commas between them" if parts == (str,) else "a list like [1, 2]"
    return "a mapping like {name: value}" if origin is dict else "valid"


def _is_numbers(text: str) -> bool:
    try:
        return "," in text and bool([float(part) for part in text.split(",")])
    except ValueError:
        return False


def _holds_tuple(kind: Any) -> bool:
    return typing.get_origin(kind) in (tuple, list) or any(_holds_tuple(part) for part in typing.get_args(kind))
