"""Images in, batches out: sources (digits, folders), the Pillow pipeline in worker processes, loaders.

    source = create_source(cfg)                                     # DataError before anything else starts
    with create_loader(source, cfg, (224, 224), batch_size=64, seed=0) as loader:
        for batch in loader: ...                                    # RawBatch, endless
    for images, labels in eval_batches(source, cfg, (224, 224), 64): ...

Names that need torch are imported when they are first used, so that reading `DataConfig` (for `--help`) costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastmim.data.config import DataConfig
from fastmim.data.errors import BadDataError, DataError, WorkerError
from fastmim.data.views import ViewSpec

if TYPE_CHECKING:
    from fastmim.data.evaluation import eval_batches, split
    from fastmim.data.loader import Loader, RawBatch, TrainLoader, create_loader
    from fastmim.data.pixels import normalise
    from fastmim.data.sources import Source, create_source, held_out_source

__all__ = [
    "BadDataError",
    "DataConfig",
    "DataError",
    "Loader",
    "RawBatch",
    "Source",
    "TrainLoader",
    "ViewSpec",
    "WorkerError",
    "create_loader",
    "create_source",
    "eval_batches",
    "held_out_source",
    "normalise",
    "split",
]

_HOMES = {
    "Loader": "loader",
    "RawBatch": "loader",
    "TrainLoader": "loader",
    "create_loader": "loader",
    "Source": "sources",
    "create_source": "sources",
    "held_out_source": "sources",
    "eval_batches": "evaluation",
    "split": "evaluation",
    "normalise": "pixels",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
