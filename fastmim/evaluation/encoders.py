"""Encoders from wherever they lie: a run, a checkpoint, an export, a safetensors file, or nowhere (`random:NAME`).

Only safetensors and JSON are read, so no file can run code; names and shapes are checked before a weight is touched.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastmim.engine.checkpoint import find_checkpoint, misfits
from fastmim.engine.errors import CheckpointError
from fastmim.models import Encoder, create_encoder
from fastmim.models.encoder import pair

PREFIX = "encoder."  # of the encoder's parameters among a method's
RANDOM = "random:"


@dataclass
class RunMeta:
    """What is known about an encoder besides its weights."""

    name: str  # timm's name
    kwargs: dict[str, Any] = field(default_factory=dict)  # what timm.create_model and create_encoder take besides
    img_size: tuple[int, int] | None = None  # height, width of the images it was trained on
    in_chans: int = 3
    mean: tuple[float, ...] | None = None  # per channel, of the normalisation it was trained with
    std: tuple[float, ...] | None = None
    step: int | None = None  # of the checkpoint
    path: Path | None = None  # where the weights came from; None for random ones
    averaged: bool = False  # whether they are the run's moving average


def load_encoder(
    spec: str | Path,
    *,
    seed: int = 0,
    img_size: tuple[int, int] | None = None,
    default_img_size: tuple[int, int] | None = None,
    in_chans: int = 3,
) -> tuple[Encoder, RunMeta]:
    """Build the encoder that `spec` names, on the CPU.

    Args:
        spec: a run folder (its newest checkpoint), a checkpoint folder, an export folder, a .safetensors file with
            config.json beside it, or `random:` followed by one of these or by an encoder's name: the same encoder with
            new weights. Where a run kept a moving average of its weights, that is what is loaded.
        seed: of random weights.
        img_size: (height, width) that the encoder must take. What was trained has a size of its own, which transformers
            cannot leave; convolutional encoders take any.
        default_img_size: for `random:NAME` when `img_size` is None; without either, the size of that name.
        in_chans: for `random:NAME`; what was trained has channels of its own.

    Raises:
        ValueError: nothing usable there, or weights that do not fit the encoder described; the message says which.
    """
    text = str(spec)
    fresh = text.startswith(RANDOM)
    place = Path(text.removeprefix(RANDOM)).expanduser()
    weights: Mapping[str, Tensor] | None = None
    if fresh and not place.exists():
        meta = RunMeta(text.removeprefix(RANDOM), {"in_chans": in_chans}, img_size or default_img_size, in_chans)
    else:
        meta, weights = _read(place)
        if fresh:
            meta.step, meta.path, meta.averaged, weights = None, None, False, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = create_encoder(meta.name, **{"img_size": img_size or meta.img_size, **meta.kwargs})
    own_size = getattr(encoder, "img_size", None) or meta.img_size  # convolutional encoders only record it
    if img_size is not None and own_size is not None and own_size != img_size:
        own, asked = (f"{height}x{width}" for height, width in (own_size, img_size))
        raise ValueError(f"img_size: the encoder in {place} takes images of {own}, but {asked} was asked for")
    meta.img_size, meta.in_chans = own_size, encoder.in_chans
    if weights is not None:
        load_weights(encoder, weights, f"{meta.path}")
    return encoder, meta


def load_weights(encoder: Encoder, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy `weights` into the encoder when all names and shapes agree; floating-point types are converted.

    Raises:
        ValueError: what does not agree; the encoder is as it was.
    """
    own = encoder.state_dict()
    converted = {
        name: tensor.to(own[name].dtype)
        if name in own and tensor.is_floating_point() and own[name].is_floating_point()
        else tensor
        for name, tensor in weights.items()
    }
    problems = misfits(own, converted)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{where} does not hold a {encoder.name}: {'; '.join(problems[:5])}{more}")
    encoder.load_state_dict(converted, strict=True)


def _read(place: Path) -> tuple[RunMeta, Mapping[str, Tensor]]:
    """Facts and weights from a path."""
    if place.is_file():
        if place.name.startswith("method") and (place.parent / "state.json").exists():
            return _read_checkpoint(place.parent)
        if place.suffix != ".safetensors":
            raise ValueError(f"{place}: only .safetensors files are read (others can run code when they are loaded)")
        return _read_export(place)
    if not place.is_dir():
        raise ValueError(
            f"{place}: there is no such run, checkpoint, export or file; an untrained encoder is random:NAME, "
            "such as random:vit_tiny_patch16_224"
        )
    if (place / "state.json").exists() or (place / "checkpoints").is_dir() or place.name.startswith("step-"):
        return _read_checkpoint(place)
    if (place / "config.json").exists():
        return _read_export(place / "model.safetensors")
    raise ValueError(
        f"{place}: holds no checkpoints (of a run), state.json (of a checkpoint) or config.json (of an export)"
    )


def _read_checkpoint(folder: Path) -> tuple[RunMeta, Mapping[str, Tensor]]:
    try:
        checkpoint = find_checkpoint(folder)
    except CheckpointError as error:
        raise ValueError(str(error).removeprefix("resume: ")) from None
    averaged = "ema" in checkpoint.outlines()
    tensors = checkpoint.group("ema" if averaged else "method")
    facts = checkpoint.state.get("meta", {})
    try:
        meta = RunMeta(
            str(facts["encoder"]),
            _known(facts["timm_kwargs"]),
            pair(facts["img_size"], "img_size"),
            int(facts["in_chans"]),
            tuple(facts["mean"]),
            tuple(facts["std"]),
            checkpoint.step,
            checkpoint.path,
            averaged,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{checkpoint.path}/state.json does not describe an encoder (meta: {error})") from None
    return meta, {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}


def _read_export(file: Path) -> tuple[RunMeta, Mapping[str, Tensor]]:
    """A safetensors file described by the config.json beside it, in the layout of timm's models on the hub."""
    config = file.with_name("config.json")
    try:
        facts = json.loads(config.read_text(encoding="utf-8"))
        trained = facts.get("pretrained_cfg", facts)  # older files have only that part
        channels, *size = trained.get("input_size", (3, None, None))
        kwargs = {"num_classes": facts.get("num_classes", trained.get("num_classes", 0))}
        kwargs |= _known(facts.get("model_args", {}))
        meta = RunMeta(
            str(facts["architecture"]),
            kwargs,
            pair(size, "input_size") if None not in size else None,
            int(channels),
            tuple(trained["mean"]) if "mean" in trained else None,
            tuple(trained["std"]) if "std" in trained else None,
            path=file,
        )
        return meta, load_file(file)
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.filename or file} is missing; weights are read with config.json beside them"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        what = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else error
        raise ValueError(f"{file} with {config.name} cannot be read as an encoder ({what})") from None


def _known(kwargs: Any) -> dict[str, Any]:
    """Keyword arguments from JSON, which turns tuples into lists."""
    return {str(key): tuple(value) if isinstance(value, list) else value for key, value in dict(kwargs).items()}
