"""timm, which the encoders are compared with; it is no dependency, so its tests are skipped where it is missing."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

_keep_alive: list[torch.library.Library] = []  # a schema lives as long as the object that defined it


def _torchvision_operators_load() -> bool:
    """timm imports torchvision; do its compiled operators fit this torch?"""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    for compiled in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(compiled))
        except OSError:
            continue
        if hasattr(torch.ops.torchvision, "nms"):
            return True
    return False


def _define_torchvision_schemas() -> None:
    """A torchvision without its compiled operators imports once the schemas of these two exist."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _keep_alive.append(library)


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    for package in ("timm", "torchvision"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(
                f"{package} is not installed; `pip install --no-deps timm torchvision` adds what timm needs here"
            )
    if not _torchvision_operators_load():
        _define_torchvision_schemas()
    return importlib.import_module("timm")
