"""Where a run writes, and whether it continues what lies there.

A folder with a run in it is continued when its settings are the same, and never overwritten.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastmim.config import ConfigError, TrainConfig, differences, read_yaml, run_of, to_dict
from fastmim.engine.run_folder import is_locked

__all__ = ["Place", "choose_place", "is_finished"]

# What may differ when a run continues: its length and what leaves the course of training alone.
MAY_CHANGE = (
    "epochs",
    "max_steps",
    "evaluate",
    "log.",
    "data.root",
    "data.pipeline",  # the loader says what this means for the batches, and keeps to what the run began with if unsure
    "data.dali_device",
    "data.workers",
    "data.prefetch",
    "engine.checkpoint_every",
    "engine.keep_checkpoints",
    "engine.nonfinite",
    "engine.max_skips",
    "engine.timeout",
    "engine.watchdog",
    "engine.parallel",
    "engine.checkpoint",
    "engine.async_save",
)
NOT_COMPARED = ("out", "resume", "resume_allow", "dry_run", "recipe")  # names and places, not settings


@dataclass
class Place:
    """The output folder of a run and what is done there."""

    folder: Path
    resume: str = "never"
    """For the trainer: never, auto (the newest good checkpoint of the folder), or the path of a checkpoint."""
    changed: tuple[str, ...] = ()
    """Differences to the run that is continued, as lines to print."""

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `Place(**...)` takes it back."""
        return asdict(self) | {"folder": str(self.folder)}


def choose_place(cfg: TrainConfig) -> Place:
    """Decide it from `out`, `resume` and what exists.

    Raises:
        ConfigError: the folder holds another run, or one that may not be continued.
    """
    if cfg.resume not in ("auto", "never"):
        path = Path(cfg.resume)
        folder = run_of(path)
        return Place(folder, "auto" if folder == path else str(path), _agreeing(folder, cfg))
    if cfg.out is not None:
        if not _holds_run(cfg.out):
            return Place(cfg.out)
        if cfg.resume == "never":  # the run folder moves what is there to previous-1/
            return Place(cfg.out)
        return Place(cfg.out, "auto", _agreeing(cfg.out, cfg))
    number = 1
    while (folder := Path("runs") / (cfg.name if number == 1 else f"{cfg.name}-{number}")).exists():
        unfinished = _holds_run(folder) and not is_finished(folder) and not is_locked(folder)
        if cfg.resume == "auto" and unfinished and not _compare(folder, cfg):
            return Place(folder, "auto")
        number += 1
    return Place(folder)


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder came to its end."""
    try:
        return json.loads((folder / "exit.json").read_text(encoding="utf-8")).get("code") == 0
    except (OSError, ValueError, AttributeError):
        return False


def _holds_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def _compare(folder: Path, cfg: TrainConfig) -> dict[str, tuple[Any, Any]]:
    found = differences(read_yaml(folder / "config.yaml"), to_dict(cfg))
    return {key: values for key, values in found.items() if key not in NOT_COMPARED}


def _agreeing(folder: Path, cfg: TrainConfig) -> tuple[str, ...]:
    """What changed against the run in `folder`, where all of it may change; an error with all differences otherwise."""
    found = _compare(folder, cfg)
    lines = {key: f"{key}: {_text(old)} -> {_text(new)}" for key, (old, new) in found.items()}
    refused = [line for key, line in lines.items() if not key.startswith(MAY_CHANGE) and not _allowed(key, cfg)]
    if refused:
        raise ConfigError(
            f"out: {folder} holds a run with other settings:\n  "
            + "\n  ".join(refused)
            + "\nThese may not change when a run continues. Choose another --out, or the settings of that run "
            f"(--resume {folder} takes them all). What may change: {', '.join(key.rstrip('.') for key in MAY_CHANGE)}; "
            f"and what you allow by name: --resume_allow KEY,KEY."
        )
    return tuple(lines.values())


def _allowed(key: str, cfg: TrainConfig) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in cfg.resume_allow)


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
