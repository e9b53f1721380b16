from collections.abc import Callable
from pathlib import Path

import pytest

from tests.damaged_images import damaged  # noqa: F401  (a fixture)
from tests.data.write_shards import Sample, samples_of


@pytest.fixture(scope="session")
def samples(class_folder: Path) -> list[Sample]:
    """The images of `class_folder` as shards hold them."""
    return samples_of(class_folder)


@pytest.fixture
def with_files(jpeg_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of `good` real photographs beside the given files."""

    def make(files: dict[str, bytes], good: int = 24) -> Path:
        folder = tmp_path / "images"
        folder.mkdir()
        for path in sorted(jpeg_folder.iterdir())[:good]:
            (folder / path.name).write_bytes(path.read_bytes())
        for name, contents in files.items():
            (folder / name).write_bytes(contents)
        return folder

    return make
