from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastmim.engine import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder(tmp_path / "run") as folder:
        yield folder


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The models here are so small that a second thread only gets in the way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
