"""Judge frozen features: `python -m fastmim.evaluate knn|linear --checkpoint RUN --data.root DIR [--json FILE]`."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fastmim.command_line import command
from fastmim.config import ConfigError, uses_digits
from fastmim.data import DataConfig
from fastmim.options import parse_options, writing

USAGE = "python -m fastmim.evaluate knn|linear --checkpoint RUN [--data.root DIR] [--key value ...]"
DESCRIPTION = (
    "Top-1 accuracy of an encoder's frozen features, by k nearest neighbours (knn) or a logistic regression (linear). "
    "Each image is resized and cropped at its centre; with train/ and val/ folders the accuracy is that on val, "
    "otherwise a fifth of each class is held out, another one for every seed."
)


@dataclass
class EvaluateConfig:
    """Which encoder, which images, and how they are compared."""

    checkpoint: str | None = None
    """A run folder, a checkpoint folder, an export folder, a .safetensors file with its config.json, or random:
    followed by one of these or by an encoder's name, such as random:vit_tiny_patch16_224, for untrained weights."""
    data: DataConfig = field(default_factory=DataConfig)
    img_size: int | tuple[int, int] | None = None
    """Side of the images in pixels, or height,width. Without one: that of the encoder's training; for random:NAME 224,
    or 32 for the digits."""
    seeds: int = 3
    """How many splits are averaged, where the data has no held-out folder."""
    seed: int = 0
    """The first of the seeds; also decides the weights of random: encoders."""
    k: int = 20
    """knn: how many neighbours vote."""
    temperature: float = 0.07
    """knn: a neighbour weighs exp(cosine similarity / temperature)."""
    l2: float = 1.0
    """linear: strength of the penalty on the weights, 1/C in scikit-learn's words."""
    pool: Literal["avg", "head"] = "avg"
    """avg: mean of the last feature map. head: what timm's classifier would be given (a ViT's class token)."""
    batch_size: int = 128
    """Images at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the encoder computes."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the encoder; auto takes bf16 where the device is fast at it."""
    json: Path | None = None
    """File for the figures."""


def main(argv: list[str]) -> None:
    kind, cfg = parse_options(EvaluateConfig, argv, usage=USAGE, description=DESCRIPTION, word="knn or linear")
    if kind not in ("knn", "linear"):
        raise ConfigError(f"{kind}: is neither knn nor linear: {USAGE}")
    check(cfg)
    try:
        facts = evaluate(kind, cfg)
    except ValueError as error:  # what cannot be evaluated says so in a sentence
        raise ConfigError(str(error)) from None
    if cfg.json is not None:
        with writing("json", cfg.json):
            cfg.json.parent.mkdir(parents=True, exist_ok=True)
            cfg.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def check(cfg: EvaluateConfig) -> None:
    """Raise ConfigError for what cannot be, before anything is loaded."""
    if cfg.checkpoint is None:
        raise ConfigError("checkpoint: is missing; give --checkpoint RUN, or random:NAME for an untrained encoder")
    sides = cfg.img_size if isinstance(cfg.img_size, tuple) else (cfg.img_size or 1,)
    numbers = [("seeds", cfg.seeds, 1), ("seed", cfg.seed, 0), ("k", cfg.k, 1), ("batch_size", cfg.batch_size, 1)]
    for key, value, least in [*numbers, *(("img_size", side, 1) for side in sides)]:
        if value < least:
            raise ConfigError(f"{key}: {value} is too small; {least} is the least")
    if not cfg.temperature > 0:
        raise ConfigError(f"temperature: {cfg.temperature:g} is not above 0")
    if not cfg.l2 >= 0:
        raise ConfigError(f"l2: {cfg.l2:g} is below 0")
    if cfg.json is not None and cfg.json.is_dir():
        raise ConfigError(f"json: {cfg.json} is a folder; give the name of a file")
    try:
        cfg.data.check()
    except ValueError as error:
        raise ConfigError(str(error)) from None


def evaluate(kind: str, cfg: EvaluateConfig) -> dict[str, Any]:
    """Load, measure, print; the figures as plain values."""
    from fastmim.engine.precision import choose_device
    from fastmim.evaluation import load_encoder, probe

    device = choose_device(cfg.device)
    asked = (cfg.img_size, cfg.img_size) if isinstance(cfg.img_size, int) else cfg.img_size
    usual, chans = ((32, 32), 1) if uses_digits(cfg.data) else ((224, 224), 3)
    encoder, meta = load_encoder(
        str(cfg.checkpoint),
        seed=cfg.seed,
        img_size=asked,
        default_img_size=usual,
        in_chans=cfg.data.in_chans or chans,
    )
    data = replace(
        cfg.data,
        in_chans=meta.in_chans,
        mean=cfg.data.mean if cfg.data.mean is not None else meta.mean,
        std=cfg.data.std if cfg.data.std is not None else meta.std,
    )
    size = meta.img_size or usual
    score = probe(
        encoder.to(device),
        data,
        size,
        [kind],
        seeds=range(cfg.seed, cfg.seed + cfg.seeds),
        precision=cfg.precision,
        batch_size=cfg.batch_size,
        pool=cfg.pool,
        options={"k": cfg.k, "temperature": cfg.temperature} if kind == "knn" else {"l2": cfg.l2},
    )[kind]
    weights = "random weights" if meta.path is None else f"{meta.path}{' (averaged weights)' if meta.averaged else ''}"
    where = "digits" if uses_digits(data) else data.root
    print(f"{meta.name}, {weights}; {where}: {score.train_images} + {score.test_images} images of {size[0]}x{size[1]}")
    print(score)
    return {
        "checkpoint": cfg.checkpoint,
        "encoder": meta.name,
        "step": meta.step,
        "data": str(where),
        "img_size": list(size),
        "pool": cfg.pool,
        "precision": cfg.precision,
        **score.to_dict(),
    }


if __name__ == "__main__":
    command(main)
