import pytest


@pytest.fixture(autouse=True)
def _instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test with a `backend` parameter runs with that backend's instruction set."""
    isa = getattr(request.node, "callspec", None) and getattr(request.node.callspec.params.get("backend"), "isa", "")
    if isa:
        monkeypatch.setenv("FASTMIM_ISA", isa)
