"""The compiled part, fastmim._C: loaded once, or the reason why it is not there."""

import importlib
import logging
from functools import cache
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  (before fastmim._C: both then share torch's OpenMP pool)

_FAILURE = Path(__file__).parents[1] / "_build_failure.txt"
_log = logging.getLogger("fastmim")


@cache
def load_extension() -> tuple[ModuleType | None, str]:
    """Returns (fastmim._C, "") or (None, why it cannot be loaded). Says so once on the log."""
    try:
        return importlib.import_module("fastmim._C"), ""
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "fastmim._C":
            reason = "fastmim._C is not built"
            if _FAILURE.exists():
                reason += ", its build failed: " + _FAILURE.read_text().strip()
            else:
                reason += ": run `pip install -e .` in the checkout (needs a C++17 compiler)"
        else:
            reason = f"fastmim._C does not load: {error}"
    _log.warning("compiled kernels are not available; the slower reference is used (python -m fastmim.info tells why)")
    return None, reason
