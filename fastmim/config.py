"""The schema of a training run: what can be set, what it means, and which values make sense together.

A run's settings come from layers, the later one winning: the defaults of these dataclasses, a recipe, a YAML file, the
command line. `fastmim.command_line.parse` joins them; this file knows nothing of argument strings.
"""

import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from fastmim.data import DataConfig
from fastmim.data.layout import check_root
from fastmim.engine.settings import EngineConfig, LogConfig, OptimConfig

__all__ = [
    "ConfigError",
    "ModelConfig",
    "TrainConfig",
    "build",
    "check",
    "differences",
    "flat",
    "list_recipes",
    "read_yaml",
    "recipe_file",
    "run_of",
    "settle",
    "to_dict",
    "to_yaml",
]

RECIPES = Path(__file__).parent / "recipes"
_CNNS = {"spark": "resnet18", "fcmae": "convnextv2_atto"}  # the encoder of methods that take CNNs only, by default


class ConfigError(ValueError):
    """A setting that cannot be: the message names the key, its value and what would be right."""

    code = 2


@dataclass
class ModelConfig:
    """The encoder that is trained. Names and arguments are timm's."""

    name: str | None = None
    """Encoder, by timm's name (vit_base_patch16_224, resnet50, convnext_small, ...). Without one: a small ViT
    whose patch suits the image size, or a small CNN for methods that take CNNs only."""
    patch_size: int | None = None
    """Side of a ViT's patch in pixels. Without one: the model's own."""
    drop_path_rate: float = 0.0
    """Stochastic depth: the last block is skipped with this probability, earlier ones proportionally less."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the encoder, by timm's names, such as {init_values: 0.1}."""


@dataclass
class TrainConfig:
    """Everything that decides a training run."""

    recipe: str | None = None
    """Name of a recipe in fastmim/recipes, or path of a YAML file with these same keys."""
    method_name: str = "a2mim"
    """Chosen by --method NAME."""
    method: Any = None
    """The method's own settings: the dataclass that `fastmim.methods.method_config(method_name)` gives."""
    model: ModelConfig = field(default_factory=ModelConfig)
    epochs: float | None = None
    """Passes over the data; a fraction is allowed. 100 where neither this nor max_steps is given."""
    max_steps: int | None = None
    """Length of the run in steps, in place of epochs."""
    batch_size: int = 128
    """Images per step, over all processes and accumulated micro-batches together."""
    img_size: int | tuple[int, int] | None = None
    """Side of the training images in pixels, or height,width. Where not given: 224 for folders; for digits 32, or 96
    for methods on CNNs, whose mask has cells of 32 pixels."""
    seed: int = 0
    """Decides every random draw: weights, order of images, crops, masks."""
    out: Path | None = None
    """Output folder. Without one: runs/NAME-MODEL, with a number where that exists."""
    resume: str = "auto"
    """auto: continue an unfinished run of these very settings where there is one. never: start anew. PATH: continue
    that run folder or checkpoint."""
    resume_allow: list[str] = field(default_factory=list)
    """Settings or groups, such as optim.lr,data, that may differ from those of the run that is continued although they
    change its course. (Its length, and what leaves its course alone, may differ anyway.)"""
    dry_run: bool = False
    """Check everything, say what would be trained, and end: nothing is trained or written."""
    evaluate: bool = False
    """Measure the encoder by k-NN and linear probe before and after training, where the data has labels."""
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the training images."""
        size = self.img_size if self.img_size is not None else 224
        return (size, size) if isinstance(size, int) else size

    @property
    def name(self) -> str:
        """What the run is called after: its recipe or method, and its encoder."""
        return f"{Path(self.recipe).stem if self.recipe else self.method_name}-{self.model.name}"

    def total_steps(self, steps_per_epoch: int) -> int:
        """Length of the run in optimiser steps; at least one."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, round((self.epochs or 0) * steps_per_epoch))


def settle(cfg: TrainConfig) -> TrainConfig:
    """Fill in what was left open and depends on other settings: size, length, encoder and its patch."""
    cnn = _CNNS.get(cfg.method_name)
    if cfg.img_size is None:
        cfg.img_size = 224 if not uses_digits(cfg.data) else 96 if cnn else 32
    if cfg.epochs is None and cfg.max_steps is None:
        cfg.epochs = 100
    if cfg.model.name is None and cnn:
        cfg.model.name = cnn
    if cfg.model.name is None:
        cfg.model.name = "vit_tiny_patch16_224"
        if cfg.model.patch_size is None:
            cfg.model.patch_size = _patch_for(cfg.size)
    return cfg


def uses_digits(data: DataConfig) -> bool:
    return data.source == "digits" or (data.source is None and data.root is None)


def _patch_for(size: tuple[int, int]) -> int:
    """The largest patch of 16, 8, 4, 2 pixels that divides the image and leaves at least six patches on a side."""
    fitting = [p for p in (16, 8, 4, 2) if size[0] % p == 0 and size[1] % p == 0 and min(size) // p >= 6]
    return fitting[0] if fitting else 16


def check(cfg: TrainConfig) -> None:
    """Raise ConfigError for what can be seen to be impossible without building or loading anything."""
    _at_least("batch_size", cfg.batch_size, 1)
    _at_least("max_steps", cfg.max_steps, 1)
    _at_least("seed", cfg.seed, 0)
    for side in cfg.size:
        _at_least("img_size", side, 1)
    if cfg.seed >= 2**63:
        raise ConfigError(f"seed: {cfg.seed} is too large; it must be below 2^63")
    if cfg.epochs is not None and not 0 < cfg.epochs < math.inf:
        raise ConfigError(f"epochs: {cfg.epochs:g} is not a number above 0")
    if cfg.batch_size % cfg.optim.accumulate:
        raise ConfigError(f"batch_size: {cfg.batch_size} is not divisible by optim.accumulate {cfg.optim.accumulate}")
    group, images = getattr(cfg.method, "group_size", 1), cfg.batch_size // cfg.optim.accumulate
    if group > 1 and images % group:
        raise ConfigError(
            f"batch_size: {cfg.batch_size} images{_in_parts(cfg.optim.accumulate)} do not divide into groups of "
            f"{group} (method.group_size); {_near_multiples(cfg.batch_size, group * cfg.optim.accumulate)} would do"
        )
    ratio = getattr(cfg.method, "mask_ratio", None)
    if ratio is not None and not 0 < ratio < 1:
        raise ConfigError(
            f"method.mask_ratio: {ratio:g} is not between 0 and 1 (both excluded): some cells must be hidden, some seen"
        )
    if cfg.model.patch_size is not None:
        _at_least("model.patch_size", cfg.model.patch_size, 1)
        check_patch(cfg.size, cfg.model.patch_size)
    try:
        cfg.data.check()
        if cfg.data.root is not None:
            check_root(cfg.data.root, cfg.data.source)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if cfg.out is not None and ".." in cfg.out.parts:
        raise ConfigError(f"out: {cfg.out} has '..' in it; give a folder below this one, or an absolute path")
    if cfg.out is not None and cfg.out.exists() and not cfg.out.is_dir():
        raise ConfigError(f"out: {cfg.out} is a file, not a folder")
    _known_settings("resume_allow", cfg.resume_allow, flat(to_dict(cfg)))


def _known_settings(key: str, names: list[str], known: dict[str, Any]) -> None:
    from difflib import get_close_matches

    for name in names:
        if not any(setting == name or setting.startswith(f"{name}.") for setting in known):
            close = get_close_matches(name, known, 1, 0.6)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{key}: there is no setting {name!r}{hint}")


def check_patch(size: tuple[int, int], patch: int) -> None:
    """Refuse an image that is not a whole number of patches, and say which sizes around it would be."""
    for side in size:
        if side % patch:
            near = sorted({max(side // patch, 1) * patch, (side // patch + 1) * patch})
            raise ConfigError(
                f"img_size: {side} is not divisible by the patch size {patch}; {' or '.join(map(str, near))} would be"
            )


def _at_least(key: str, value: Any, least: int) -> None:
    if isinstance(value, int) and value < least:
        raise ConfigError(f"{key}: {value} is too small; {least} is the least")


def list_recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """The YAML behind `--recipe NAME`: one of ours, or a path that ends in .yaml."""
    from difflib import get_close_matches

    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = list_recipes()
    if name in known:
        return RECIPES / f"{name}.yaml"
    close = get_close_matches(name, known, 1, 0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(
        f"recipe: there is no recipe {name!r}; {hint}There are: {', '.join(known)}; or a path ending in .yaml"
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Plain data only: a tag that would build a Python object is refused."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.constructor.ConstructorError as error:
        raise ConfigError(f"{path}: refused, it asks for more than plain values ({error.problem})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: holds a {type(content).__name__}; a mapping of settings is expected, such as 'epochs: 100'"
        )
    return content


def run_of(path: Path) -> Path:
    """The run folder that a path means: itself, or the run to which a checkpoint belongs."""
    return path.parent.parent if path.parent.name == "checkpoints" else path


def to_dict(cfg: TrainConfig) -> dict[str, Any]:
    """Plain values under the keys that YAML files and the command line use."""
    values = _plain(asdict(cfg))
    name = values.pop("method_name")
    values["method"] = {"name": name, **(values["method"] or {})}
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def to_yaml(cfg: TrainConfig) -> str:
    """The settings of a run; `--config FILE` with them starts the same run again, in a folder of its own."""
    values = to_dict(cfg) | {"out": None, "resume": "auto"}
    for key in ("resume_allow", "dry_run"):  # of one start, not of the run
        del values[key]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}. What is free-form (model.kwargs) stays whole."""
    items: dict[str, Any] = {}
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and dotted != "model.kwargs":
            items |= flat(value, f"{dotted}.")
        else:
            items[dotted] = value
    return items


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys that both have, with values that are not the same. (Another version may have had other keys.)"""
    one, two = flat(old), flat(new)
    return {key: (one[key], two[key]) for key in one if key in two and one[key] != two[key]}


def build(cls: type, values: dict[str, Any]) -> Any:
    """A dataclass from nested plain values; nested dataclasses are found by their fields' types."""
    made = {}
    for item in fields(cls):
        if item.name in values:
            kind, value = item.type, values[item.name]
            made[item.name] = build(kind, value) if isinstance(kind, type) and is_dataclass(kind) else value
    try:
        return cls(**made)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _in_parts(accumulate: int) -> str:
    return f" in {accumulate} micro-batches" if accumulate > 1 else ""


def _near_multiples(value: int, step: int) -> str:
    """ "28 or 32" for 30 and 4."""
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)
