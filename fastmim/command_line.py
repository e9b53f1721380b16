"""From the words of a command line to a TrainConfig; and the one place where errors become exit codes.

Layers, the later one winning: defaults, recipe, --config file, command line. Every setting of every layer takes the
same road: one `--key=value` word, parsed by jsonargparse against the dataclasses of `fastmim.config`. So a mistake in a
recipe is answered as precisely as one on the command line.
"""

import errno
import os
import sys
import typing
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from fastmim.closed_output import while_output_is_read
from fastmim.config import (
    ConfigError,
    TrainConfig,
    build,
    check,
    flat,
    list_recipes,
    read_yaml,
    recipe_file,
    run_of,
    settle,
    to_yaml,
)
from fastmim.engine.errors import CTRL_C, PREEMPTED, exit_code
from fastmim.methods import list_methods, method_config
from fastmim.words import did_you_mean, hide_groups, key_types, split_words, typed_value

__all__ = ["ConfigError", "command", "load_config", "parse"]

DEFAULT_RECIPE = "digits"
FLAGS = ("help", "print_config", "config")  # words that are no settings

# Setting the first un-sets the others where a lower layer has them.
OVERRULES = {
    "epochs": ["max_steps"],
    "max_steps": ["epochs"],
    "optim.lr": ["optim.base_lr"],
    "optim.base_lr": ["optim.lr"],
    "optim.warmup_epochs": ["optim.warmup_steps"],
    "optim.warmup_steps": ["optim.warmup_epochs"],
}

Layer = tuple[str, dict[str, Any]]
"""Where it comes from ("": the command line), and dotted key -> value, as text or as YAML has it."""


def parse(argv: Sequence[str]) -> TrainConfig:
    """The configuration that these words ask for, complete and checked.

    Raises:
        ConfigError: an unknown key, a wrong type, an impossible value or combination: in one or two sentences.
        SystemExit: with 0, after --help or --print_config.
    """
    words = split_words(argv)
    for short in ("method", "model"):
        if short in words:
            words[f"{short}.name"] = words.pop(short)
    layers = _layers(words)
    method = _method_of(layers)
    types_of = key_types(TrainConfig) | {"method.name": str} | key_types(method_config(method), "method.")
    del types_of["method"], types_of["method_name"]
    parser = _parser(method)
    merged: dict[str, Any] = {}
    for where, layer in layers:
        given = {key: typed_value(parser, where, key, value, types_of) for key, value in layer.items()}
        _merge(where, merged, given)
    parser.set_defaults(merged)
    if "help" in words:
        parser.print_help()
        raise SystemExit(0)

    values = parser.get_defaults().as_dict()
    name = values["method"].pop("name")
    cfg = build(TrainConfig, values | {"method": build(method_config(name), values["method"]), "method_name": name})
    check(settle(cfg))
    if "print_config" in words:
        print(to_yaml(cfg), end="")
        raise SystemExit(0)
    return cfg


def load_config(file: Path) -> TrainConfig:
    """The configuration in a run's config.yaml."""
    return parse(["--config", str(file)])


def _layers(words: dict[str, str | None]) -> list[Layer]:
    """Recipe, files and command line, lowest first."""
    layers: list[Layer] = []
    resume = words.get("resume") or "auto"
    if resume not in ("auto", "never"):
        folder = run_of(Path(resume))
        if not (folder / "config.yaml").is_file():
            raise ConfigError(
                f"resume: {resume} is neither auto nor never, nor a run folder or a checkpoint of one "
                f"({folder}/config.yaml is missing)"
            )
        layers.append(_file_layer(folder / "config.yaml", str(folder / "config.yaml")))
        layers[-1][1]["out"] = str(folder)
        layers[-1][1].setdefault("recipe", None)
    if "config" in words:
        if words["config"] is None:
            raise ConfigError("config: needs a value, the path of a YAML file")
        layers.append(_file_layer(Path(words["config"]), words["config"]))
    layers.append(("", {key: text for key, text in words.items() if key not in FLAGS}))
    given = {key: value for _, layer in layers for key, value in layer.items()}
    recipe = given.get("recipe")
    if "recipe" not in given and not {"method.name", "data.root", "data.source"} & given.keys():
        recipe = DEFAULT_RECIPE
    if (
        recipe is not None
        and recipe != "null"
        and not (layers[0][1].get("recipe") == recipe and resume not in ("auto", "never"))
    ):
        where, layer = _file_layer(recipe_file(str(recipe)), f"recipe {recipe}")
        layers.insert(0, (where, layer | {"recipe": str(recipe)}))
    return layers


def _file_layer(file: Path, where: str) -> Layer:
    content = read_yaml(file)
    for short in ("method", "model"):
        if isinstance(content.get(short), str):
            content[short] = {"name": content[short]}
    return where, flat(content)


def _method_of(layers: list[Layer]) -> str:
    """The method's name, from the highest layer that has one; two layers may not contradict each other."""
    name, owner = "a2mim", None
    for where, layer in layers:
        asked = layer.get("method.name")
        if asked is None:
            continue
        if owner is not None and asked != name:
            raise ConfigError(f"method: {asked} conflicts with {owner}, whose method is {name}; give one of the two")
        name, owner = str(asked), where
    if name not in list_methods():
        known = ", ".join(list_methods())
        raise ConfigError(
            f"method: there is no method {name!r}; {did_you_mean(name, list_methods())}there are: {known}"
        )
    return name


def _parser(method: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m fastmim.train",
        usage="python -m fastmim.train [--recipe NAME] [--data.root DIR] [--key value ...]",
        description="Pre-train an encoder by masked image modeling. Without arguments: a complete small run on a CPU.",
        epilog=f"Recipes: {', '.join(list_recipes())}.\nMethods: {', '.join(list_methods())}.",
        exit_on_error=False,
    )
    parser.add_argument(
        "--config",
        type=str,
        help="YAML file with these same keys, such as the config.yaml of a run: does that run again.",
    )
    parser.add_argument(
        "--print_config", action="store_true", help="Print the whole resulting configuration as YAML and end."
    )
    parser.add_class_arguments(TrainConfig, skip={"method", "method_name"})
    parser.add_class_arguments(method_config(method), "method")
    parser.add_argument("--method.name", default=method, help=SUPPRESS)
    for action in parser._actions:
        if action.dest == "method":
            action.metavar, action.help = "NAME", f"The method: {', '.join(list_methods())}."
        elif action.dest == "model":
            action.metavar, action.help = "NAME", "Short for --model.name."
    hide_groups(parser)
    return parser


def _merge(where: str, merged: dict[str, Any], given: dict[str, Any]) -> None:
    """Lay one layer over those below it."""
    for key, rivals in OVERRULES.items():
        if given.get(key) is None:
            continue
        for rival in rivals:
            if given.get(rival) is not None:
                raise ConfigError(f"{key}: {given[key]:g} conflicts with {rival} {given[rival]:g}; give one of the two")
            merged[rival] = None
    if given.get("model.name", merged.get("model.name")) != merged.get("model.name"):
        for key in ("model.patch_size", "model.kwargs"):  # they belong to the other encoder
            merged.pop(key, None)
    for key, value in given.items():
        if key.startswith("model.kwargs."):
            merged["model.kwargs"] = merged.get("model.kwargs", {}) | {key.removeprefix("model.kwargs."): value}
        else:
            merged[key] = value


def command(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> typing.NoReturn:
    """Run a command and leave with its exit code. Only a bug shows a traceback."""
    try:
        with while_output_is_read():
            code = main(list(sys.argv[1:] if argv is None else argv)) or 0
    except KeyboardInterrupt:
        code = CTRL_C
        print("stopped", file=sys.stderr)
    except Exception as error:
        code = _code_of(error)
        if code == 1:
            raise
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not getattr(error, "of_all", False):
            who = f"rank {rank}: " if rank != "0" else ""
            print(who + (str(error) if code in (PREEMPTED, CTRL_C) else f"error: {error}"), file=sys.stderr)
    raise SystemExit(code)


def _code_of(error: Exception) -> int:
    """2 configuration, 3 data, 4 non-finite, 5 disk full, 75 or 130 saved and stopped, 124 process lost; 1 is a bug."""
    if isinstance(error, ConfigError):
        return 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return 5
    return exit_code(error)
