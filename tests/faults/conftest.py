import shutil
from pathlib import Path

import pytest

from tests.faults.command import train


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to. Shared: copy it before changing anything."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    done = train(out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def finished(tmp_path: Path, unbroken: Path) -> Path:
    """A copy of it, to be changed and gone on with."""
    return shutil.copytree(unbroken, tmp_path / "run")
