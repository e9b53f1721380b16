"""What the README shows to paste: its Python runs, and its set-up commands are those that CI runs."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[str(i) for i in range(len(BLOCKS))])
def test_python_runs_as_it_stands(block, request):
    if "import timm" in block:
        request.getfixturevalue("timm")  # skips where it is not installed
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_there_are_exactly_two_set_up_commands():
    assert re.findall(r"^pip install .*$", README, flags=re.MULTILINE) == [
        "pip install torch==2.13.0 -e . && python -m fastmim.train",
        "pip install torch==2.13.0 -e '.[test]' && python -m pytest -n 2",
    ]


def test_files_that_it_points_to_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
