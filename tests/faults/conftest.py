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
