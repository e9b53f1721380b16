"""Encoders by timm's names."""

import fnmatch
import inspect
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from fastmim.models.encoder import Encoder


class _Variant(NamedTuple):
    family: type[Encoder]
    settings: Mapping[str, Any]


_VARIANTS: dict[str, _Variant] = {}


def register_encoders(family: type[Encoder], variants: Mapping[str, Mapping[str, Any]]) -> None:
    """Make `create_encoder(name)` build `family(**settings)` for each name -> settings of `variants`.

    The names are timm's, and `settings` are what timm's function of that name passes to the same class, so that only
    what a caller adds has to be told to timm.
    """
    for name, settings in variants.items():
        if name in _VARIANTS:
            raise ValueError(f"encoder {name!r} is already registered, for {_VARIANTS[name].family.__name__}")
        _VARIANTS[name] = _Variant(family, settings)


def list_encoders(pattern: str = "*") -> list[str]:
    """Sorted names that match a shell pattern, such as `"vit_*_patch16_224"`."""
    return sorted(fnmatch.filter(_VARIANTS, pattern))


def create_encoder(name: str, **kwargs: Any) -> Encoder:
    """Build an encoder with timm's module structure and state-dict keys, randomly initialised.

    Args:
        name: a timm model name, one of `list_encoders()`.
        **kwargs: overrides of the variant's settings. All families take `in_chans`, `img_size`, `drop_path_rate` and
            `num_classes` (0, the default here, builds no classifier); the others are those of the family's class.
            An option that is None counts as not given.

    Returns:
        The encoder. `encoder.name` and `encoder.timm_kwargs` are such that `timm.create_model(name, **timm_kwargs)`
        builds a model with the same state dict and the same features.

    Raises:
        ValueError: an unknown name or option (with the nearest known ones), or sizes that do not fit.
    """
    if name not in _VARIANTS:
        raise ValueError(f"unknown encoder {name!r}{_nearest_names(name)}; list_encoders() names all")
    family, settings = _VARIANTS[name]
    given = {"num_classes": 0} | {key: value for key, value in kwargs.items() if value is not None}
    _check_options(name, family, given)
    encoder = family(**{**settings, **given})
    encoder.name = name
    encoder.timm_kwargs = family.to_timm(given)
    return encoder


def _nearest_names(name: str) -> str:
    sized = re.fullmatch(r"(?P<stem>\w+)_patch(?P<patch>\d+)_(?P<size>\d+)", name)
    if sized:
        siblings = list_encoders(f"{sized['stem']}_patch*_224")
        if siblings:
            nearest = "vit_tiny_patch16_224" if "vit_tiny_patch16_224" in siblings else siblings[0]
            return (
                f": any patch and image size can be had with "
                f'create_encoder("{nearest}", patch_size={sized["patch"]}, img_size={sized["size"]})'
            )
    near = get_close_matches(name.split(".")[0], _VARIANTS, n=3)
    return f": did you mean {' or '.join(near)}?" if near else ""


def _check_options(name: str, family: type[Encoder], given: Mapping[str, Any]) -> None:
    known = [option for option in inspect.signature(family).parameters if option != "self"]
    for option in given:
        if option not in known:
            near = get_close_matches(option, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
            raise ValueError(f"{name}: unknown option {option!r}; {hint}")
