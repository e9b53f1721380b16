"""What no file of this repository may do: load what can run code, run a shell, unpack archives blindly."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("fastmim", "benchmarks", "tests", "docs", "examples")
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen"}
ALLOWED = {
    "fastmim/layers/sparsify.py": {"calls exec"},  # the forward that torch.fx has just written, as fx.GraphModule does
    "tests/layers/test_sparsify.py": {"calls exec"},  # runs the example in docs/layers.md
    "tests/faults/test_untrusted.py": {"imports pickle"},  # makes a malicious file
    "tests/models/test_export_into_timm.py": {"calls exec"},  # runs the line that the export prints
    "tests/test_readme.py": {"calls exec"},  # runs the Python that the README shows
}


def sources() -> list[Path]:
    return [ROOT / "setup.py", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))]


def full_name(node: ast.expr) -> str:
    """ "torch.load" for the expression torch.load."""
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def is_true(call: ast.Call, keyword: str) -> bool:
    return any(k.arg == keyword and isinstance(k.value, ast.Constant) and k.value.value is True for k in call.keywords)


def offences(text: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            found |= {f"imports {name.split('.')[0]}" for name in modules if name.split(".")[0] in PICKLES}
        if not isinstance(node, ast.Call):
            continue
        name = full_name(node.func)
        if name == "torch.load" and not is_true(node, "weights_only"):
            found.add("torch.load without weights_only=True")
        if name in UNSAFE_CALLS or name in ("eval", "exec"):
            found.add(f"calls {name}")
        if name.endswith((".extractall", ".unpack_archive")):
            found.add("unpacks an archive")
        if is_true(node, "shell"):
            found.add("runs a shell")
        if is_true(node, "allow_pickle"):
            found.add("allows pickles in NumPy files")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_file_is_clean(path):
    relative = str(path.relative_to(ROOT))
    assert offences(path.read_text(encoding="utf-8")) - ALLOWED.get(relative, set()) == set()


@pytest.mark.parametrize(
    "text, offence",
    [
        ("torch.load(f)", "torch.load without weights_only=True"),
        ("torch.load(f, weights_only=False)", "torch.load without weights_only=True"),
        ("from pickle import loads", "imports pickle"),
        ("import numpy, joblib.numpy_pickle", "imports joblib"),
        ("yaml.load(f)", "calls yaml.load"),
        ("archive.extractall(x)", "unpacks an archive"),
        ("subprocess.run(x, shell=True)", "runs a shell"),
        ("eval(x)", "calls eval"),
        ("np.load(f, allow_pickle=True)", "allows pickles in NumPy files"),
    ],
)
def test_offences_are_seen(text, offence):
    assert offences(text) == {offence}


def test_what_is_harmless_passes():
    assert offences("model.eval(); torch.load(f, weights_only=True); yaml.safe_load(f); pattern.exec") == set()
