"""An encoder as a folder that timm reads: model.safetensors and config.json, the layout of timm's models on the hub."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmim.engine.injector import inject

if TYPE_CHECKING:
    from fastmim.models import Encoder

__all__ = ["export_encoder", "quoted", "timm_config", "timm_line"]

_FIRST_AND_LAST = {  # where timm adapts channels and classes
    "VisionTransformer": ("patch_embed.proj", "head"),
    "Beit": ("patch_embed.proj", "head"),
    "ResNet": ("conv1", "fc"),
    "ConvNeXt": ("stem.0", "head.fc"),
}


def timm_line(encoder: "Encoder", file: Path) -> str:
    """The words that build the exported encoder in timm."""
    kwargs = "".join(f", {key}={value!r}" for key, value in encoder.timm_kwargs.items())
    return f"model = timm.create_model({quoted(encoder.name)}, checkpoint_path={quoted(file)}{kwargs})"


def quoted(text: object) -> str:
    """A Python string in double quotes."""
    return json.dumps(str(text), ensure_ascii=False)


def export_encoder(
    encoder: "Encoder",
    folder: Path,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    img_size: tuple[int, int] | None = None,
) -> Path:
    """Write `folder`/model.safetensors and config.json; each appears complete, or not at all.

    Args:
        encoder: its state dict is written as it is: timm's keys.
        mean, std: per channel, of the normalisation that the encoder was trained with; ImageNet's when None.
        img_size: (height, width) it was trained on.

    Returns:
        The path of model.safetensors.
    """
    from fastmim.engine.tensor_file import write_tensors

    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(timm_config(encoder, mean, std, img_size), indent=2) + "\n"
    _replace(folder / "config.json", lambda path: path.write_text(config, encoding="utf-8"))
    _replace(folder / "model.safetensors", lambda path: write_tensors(path, encoder.state_dict()))
    return folder / "model.safetensors"


def timm_config(
    encoder: "Encoder", mean: Sequence[float] | None, std: Sequence[float] | None, img_size: tuple[int, int] | None
) -> dict[str, Any]:
    """What timm reads beside the weights."""
    from fastmim.models.token_encoder import TokenEncoder

    size = getattr(encoder, "img_size", None) or img_size or (224, 224)
    first, last = _FIRST_AND_LAST[type(encoder).__name__]
    trained = {
        "input_size": [encoder.in_chans, *size],
        "fixed_input_size": isinstance(encoder, TokenEncoder),
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "mean": list(mean) if mean is not None else _imagenet(encoder.in_chans, (0.485, 0.456, 0.406)),
        "std": list(std) if std is not None else _imagenet(encoder.in_chans, (0.229, 0.224, 0.225)),
        "num_classes": encoder.num_classes,
        "first_conv": first,
        "classifier": last,
    }
    return {
        "architecture": encoder.name,
        "num_classes": encoder.num_classes,
        "num_features": encoder.num_features,
        "model_args": encoder.timm_kwargs,
        "pretrained_cfg": trained,
    }


def _imagenet(channels: int, values: tuple[float, ...]) -> list[float]:
    return list(values) if channels == 3 else [sum(values) / 3] * channels


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then take its place; a file that could not be completed is removed."""
    for left in path.parent.glob(f".tmp-{path.name}-*"):
        if not Path("/proc", left.name.rpartition("-")[2]).exists():  # its export was killed
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        inject("export")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
