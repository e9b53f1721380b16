"""Pre-training methods. Adding one = adding its file and its line in `_FILES`.

A method's file is imported when the method is asked for, so naming the methods costs nothing.
"""

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmim.methods.base import Batch, Method, Output, Pictures
    from fastmim.models import Encoder

__all__ = ["Batch", "Method", "Output", "Pictures", "create_method", "list_methods", "method_class", "method_config"]

_FILES = {  # name -> (module, class)
    "mae": ("fastmim.methods.mae", "MAE"),
    "simmim": ("fastmim.methods.simmim", "SimMIM"),
    "a2mim": ("fastmim.methods.a2mim", "A2MIM"),
    "spark": ("fastmim.methods.spark", "SparK"),
    "fcmae": ("fastmim.methods.fcmae", "FCMAE"),
    "mixedae": ("fastmim.methods.mixedae", "MixedAE"),
}


def list_methods() -> list[str]:
    """Names that `--method` takes, sorted."""
    return sorted(_FILES)


def method_class(name: str) -> "type[Method]":
    """The class of a method. Raises `ValueError` with the nearest name when there is none."""
    if name not in _FILES:
        near = difflib.get_close_matches(name.lower().replace("²", "2").replace("-", ""), _FILES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no method {name!r}.{hint} Methods: {', '.join(list_methods())}.")
    module, attribute = _FILES[name]
    return getattr(importlib.import_module(module), attribute)


def method_config(name: str) -> type:
    """The dataclass of a method's settings."""
    return method_class(name).Config


def create_method(name: str, encoder: "Encoder", cfg: Any = None, img_size: int | tuple[int, int] = 224) -> "Method":
    """Build a method around an encoder.

    Args:
        name: one of `list_methods()`.
        encoder: from `fastmim.models.create_encoder`.
        cfg: an instance of `method_config(name)`; its defaults when None.
        img_size: side, or (height, width), of the images of the run, in pixels.

    Raises:
        ValueError: unknown name, or encoder, settings and image size that do not fit together.
    """
    kind = method_class(name)
    cfg = kind.Config() if cfg is None else cfg
    if not isinstance(cfg, kind.Config):
        raise ValueError(f"Method {name!r} takes a {kind.Config.__name__}, got a {type(cfg).__name__}.")
    size = (img_size, img_size) if isinstance(img_size, int) else (int(img_size[0]), int(img_size[1]))
    return kind(encoder, cfg, size)


def __getattr__(name: str) -> Any:
    if name in ("Batch", "Method", "Output", "Pictures"):
        return getattr(importlib.import_module("fastmim.methods.base"), name)
    raise AttributeError(f"module 'fastmim.methods' has no attribute {name!r}")
