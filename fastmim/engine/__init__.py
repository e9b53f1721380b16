"""The training engine: trainer, optimiser and schedules, EMA, checkpoints, signals, logs.

Names are imported when first used, so that `fastmim.engine.settings` answers `--help` without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmim.engine.distributed import World
    from fastmim.engine.errors import (
        CheckpointError,
        DiskFullError,
        Interrupted,
        NonFiniteError,
        ProcessLost,
        RunError,
        RunFolderError,
        exit_code,
    )
    from fastmim.engine.fit_result import FitResult
    from fastmim.engine.run_folder import RunFolder
    from fastmim.engine.settings import EngineConfig, LogConfig, OptimConfig, in_steps
    from fastmim.engine.trainer import Trainer

_HOME = {
    "CheckpointError": "errors",
    "DiskFullError": "errors",
    "EngineConfig": "settings",
    "FitResult": "fit_result",
    "Interrupted": "errors",
    "LogConfig": "settings",
    "NonFiniteError": "errors",
    "ProcessLost": "errors",
    "OptimConfig": "settings",
    "RunError": "errors",
    "RunFolder": "run_folder",
    "RunFolderError": "errors",
    "Trainer": "trainer",
    "World": "distributed",
    "exit_code": "errors",
    "in_steps": "settings",
}

__all__ = [
    "CheckpointError",
    "DiskFullError",
    "EngineConfig",
    "FitResult",
    "Interrupted",
    "LogConfig",
    "NonFiniteError",
    "OptimConfig",
    "ProcessLost",
    "RunError",
    "RunFolder",
    "RunFolderError",
    "Trainer",
    "World",
    "exit_code",
    "in_steps",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastmim.engine' has no attribute {name!r}")
    return getattr(import_module(f"fastmim.engine.{_HOME[name]}"), name)
