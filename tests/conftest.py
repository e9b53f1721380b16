"""Real photographs for every test that needs a folder of images; Triton's interpreter where there is no GPU."""

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Several processes of pytest-xdist, and the commands that their tests start, share the cores; OpenMP reads this once.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))

import torch  # noqa: E402

from tests.timm_fixture import timm  # noqa: E402, F401  (a fixture, here so that there is one for all tests)

if not torch.cuda.is_available():
    # Here, and not beside the operations' tests, because it must come before anything at all imports triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A machine that only runs benchmarks/gpu_check.sh may lack the packages behind the commands; CI has them.
_LACKING = [name for name in ("jsonargparse", "rich") if importlib.util.find_spec(name) is None]
_FAULTS = sorted(path.name for path in (Path(__file__).parent / "faults").glob("test_*.py"))
NEED_THE_COMMANDS = [
    "data/test_dali_training.py",
    "data/test_file_list.py",
    "data/test_verify.py",
    "evaluation/test_load_encoder.py",
    *(f"faults/{name}" for name in _FAULTS if name != "test_ast.py"),
    "methods/test_recipes.py",
    "models/test_export_into_timm.py",
    "test_config.py",
    "test_evaluate.py",
    "test_export.py",
    "test_train_command.py",
]


class _LeftOut(pytest.Module):
    def collect(self) -> list[pytest.Item]:
        return []


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Not collect_ignore, which files that are named on the command line pass by."""
    left_out = _LACKING and module_path.relative_to(Path(__file__).parent).as_posix() in NEED_THE_COMMANDS
    return _LeftOut.from_parent(parent, path=module_path) if left_out else None


def pytest_report_header() -> str | None:
    return f"without {' and '.join(_LACKING)}; left out: {', '.join(NEED_THE_COMMANDS)}" if _LACKING else None


if TYPE_CHECKING:
    from PIL import Image


@pytest.fixture(scope="session")
def photographs() -> "dict[str, Image.Image]":
    """Six colour photographs of 300 to 640 pixels a side, by name."""
    import skimage.data
    from PIL import Image
    from sklearn.datasets import load_sample_image

    pixels = {name: getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")}
    pixels |= {name: load_sample_image(f"{name}.jpg") for name in ("china", "flower")}
    return {name: Image.fromarray(values) for name, values in pixels.items()}


def write_crops(folder: Path, photograph: "Image.Image", count: int, seed: int) -> None:
    """`count` JPEGs, 160 x 120 or 120 x 160, each another part of the photograph."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        width, height = (160, 120) if number % 2 else (120, 160)
        left = int(rng.integers(photograph.width - width + 1))
        top = int(rng.integers(photograph.height - height + 1))
        photograph.crop((left, top, left + width, top + height)).save(folder / f"{seed}_{number:02d}.jpg", quality=90)


@pytest.fixture(scope="session")
def jpeg_folder(photographs: "dict[str, Image.Image]", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of 24 JPEGs. Shared by all tests: copy it before changing anything."""
    folder = tmp_path_factory.mktemp("photographs")
    for seed, name in enumerate(sorted(photographs)):
        write_crops(folder, photographs[name], count=4, seed=seed)
    return folder


@pytest.fixture(scope="session")
def class_folder(photographs: "dict[str, Image.Image]", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three class folders of 12 JPEGs, a class being the parts of one photograph. Shared: copy before changing."""
    folder = tmp_path_factory.mktemp("classes")
    for seed, name in enumerate(("chelsea", "coffee", "flower")):
        write_crops(folder / name, photographs[name], count=12, seed=seed)
    return folder
