import pytest


@pytest.fixture(autouse=True)
def _instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test with a `backend` parameter runs with that backend's instruction set, or with CUDA emulated."""
    callspec = getattr(request.node, "callspec", None)
    backend = callspec.params.get("backend") if callspec else None
    if isa := getattr(backend, "isa", ""):
        monkeypatch.setenv("FASTMIM_ISA", isa)
    if getattr(backend, "emulated", False):
        from tests.cuda_emulation.masked_depthwise import emulate

        emulate(monkeypatch)
