import subprocess
import sys

import pytest

from fastmim import info
from fastmim.ops import backends, extension


def test_names_every_operation_with_its_backend(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert info.main([]) == 0
    printed = capsys.readouterr().out
    for op in backends.operations():
        assert f"{op}, cpu -> " in printed
    assert "not triton: Triton" in printed
    assert "fastmim._C" in printed


def test_an_option_it_does_not_have(capsys):
    assert info.main(["--json"]) == 2
    assert "unknown option '--json'" in capsys.readouterr().err


@pytest.mark.slow  # two fresh interpreters; guards the promise that the package works without a compiler
def test_without_the_extension_it_says_why_and_the_operations_still_run():
    script = (
        "import sys, logging; logging.basicConfig(); sys.modules['fastmim._C'] = None\n"
        "import torch; from fastmim.ops import random_mask\n"
        "for _ in range(2): print(random_mask(2, 49, 19, torch.tensor([0, 0, 0])).mask.sum().item())\n"
        "from fastmim import info; info.main([])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("60\n60\n")
    assert "random_mask, cpu -> reference" in done.stdout
    assert "not available: fastmim._C is not built" in done.stdout
    assert done.stderr.count("compiled kernels are not available") == 1


def test_a_failed_build_is_remembered(tmp_path, monkeypatch):
    note = tmp_path / "_build_failure.txt"
    note.write_text("cmake: no C++ compiler\n")
    monkeypatch.setattr(extension, "_FAILURE", note)

    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(extension.importlib, "import_module", missing)
    module, reason = extension.load_extension.__wrapped__()
    assert module is None
    assert "no C++ compiler" in reason
