"""Which pipeline makes the batches of a run, and why.

Two pipelines differ by resampling, so what a run was begun with is kept in its checkpoints, and `auto` stays with it.
"""

import logging
import os
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

from fastmim.data.config import DataConfig
from fastmim.data.errors import DataError
from fastmim.data.listing import IMAGES
from fastmim.data.sources import Source

_log = logging.getLogger("fastmim.data")

_MOSTLY = 0.9  # share of JPEGs from which DALI is worth it: it reads no others
_MANY = 10_000  # images from which DALI is worth installing
_LOOKED_AT, _OPENED = 1000, 50  # names looked at for the share, or images

Device = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Choice:
    """pipeline: what makes the batches; device: where DALI does; reason: why, where it was not asked for."""

    pipeline: Literal["pillow", "dali"]
    device: Device = "cpu"
    reason: str = ""

    @property
    def name(self) -> str:
        """As a checkpoint keeps it: "pillow", "dali cpu" or "dali gpu"."""
        return "pillow" if self.pipeline == "pillow" else f"dali {self.device}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `Choice(**...)` takes it back."""
        return asdict(self)


def choose_pipeline(source: Source, cfg: DataConfig, training: Device = "cpu") -> Choice:
    """What `cfg.pipeline` and `cfg.dali_device` mean for these images, where training runs on `training`.

    Raises:
        DataError: DALI was asked for where it cannot be.
    """
    if cfg.dali_device == "gpu":
        _check_gpu(training)
    if cfg.pipeline == "pillow":
        return Choice("pillow")
    if cfg.pipeline == "dali":
        device = training if cfg.dali_device == "auto" else cfg.dali_device
        reason = _why_no_dali(device)
        if reason:
            raise DataError(f"data.pipeline: dali was asked for, but {reason}.")
        return Choice("dali", device)
    if source.in_memory:
        return Choice("pillow", reason="the images are in memory")
    share = jpeg_share(source)
    if share < _MOSTLY:
        return Choice("pillow", reason=f"{share:.0%} of the images are JPEGs, and DALI reads no others")
    if training == "cpu" or cfg.dali_device == "cpu":
        return Choice("pillow", reason="on CPUs Pillow in worker processes is faster than DALI")
    reason = _why_no_dali("gpu")
    if reason:
        hint = f"; {_HINT}" if "not installed" in reason and len(source) >= _MANY else ""
        return Choice("pillow", reason=reason + hint)
    return Choice("dali", "gpu", f"{share:.0%} of the images are JPEGs, which DALI decodes on the GPU")


_HINT = "with it, images are decoded on the GPU"


def checked(choice: Choice) -> Choice:
    """A choice that another process made.

    Raises:
        DataError: DALI is not installed here.
    """
    reason = _why_no_dali("cpu") if choice.pipeline == "dali" else ""
    if reason:
        raise DataError(f"data.pipeline: the main process chose dali, but here {reason}.")
    return choice


def choose_again(saved: str, source: Source, cfg: DataConfig, chosen: Choice, training: Device) -> Choice:
    """The choice for a run that goes on and was begun with the pipeline named `saved`: that one, unless the settings
    ask for another by name, which is mentioned.

    Raises:
        DataError: it cannot go on as it was begun, and the settings do not say what to do.
    """
    if saved == chosen.name:
        return chosen
    pipeline, _, device = cast(Any, saved.partition(" "))
    settled = replace(cfg, pipeline=pipeline) if cfg.pipeline == "auto" else cfg
    if device and settled.pipeline == "dali" and cfg.dali_device == "auto":
        settled = replace(settled, dali_device=device)
    try:
        again = choose_pipeline(source, settled, training)
    except DataError as error:
        raise DataError(
            f"The batches of this run were made by {saved}, and with another pipeline they would differ by resampling. "
            f"{error} To go on with other batches say so: --data.pipeline pillow, or --data.dali_device cpu."
        ) from None
    if again.name == saved:
        _log.info("The batches of this run were made by %s: it goes on so.", saved)
    else:
        _log.warning(
            "The batches of this run were made by %s, now they are by %s: they differ by resampling.", saved, again.name
        )
    return again


def jpeg_share(source: Source) -> float:
    """The share of JPEGs, from some of the images: by their names or, in shards, by their first bytes."""
    names = [os.fsencode(source.path(index)) for index in _some(len(source), _LOOKED_AT)]
    if IMAGES.search(names[0]):
        return sum(name.lower().endswith((b".jpg", b".jpeg")) for name in names) / len(names)
    opened = [_is_jpeg(source, index) for index in _some(len(source), _OPENED)]
    return sum(opened) / len(opened)


def _some(length: int, most: int) -> range:
    return range(0, length, -(-length // most))


def _is_jpeg(source: Source, index: int) -> bool:
    try:
        return source.open(index).format == "JPEG"
    except Exception:  # readers of damaged files raise anything
        return False


def _why_no_dali(device: Device) -> str:
    from fastmim.data.dali_trial import why_not

    return why_not(device)


def _check_gpu(training: Device) -> None:
    reason = _why_no_dali("gpu")
    if not reason and training == "cpu":
        reason = "training is on the CPU"
    if reason:
        raise DataError(f"data.dali_device: gpu was asked for, but {reason}; auto decodes where training is.")
