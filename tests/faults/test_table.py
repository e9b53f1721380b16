"""docs/reliability.md: every row of the fault table that is promised is there, and every test that it names exists."""

import ast
import re
from pathlib import Path

import pytest

from fastmim.engine import errors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if re.match(r"\| \d+ \| [^|]*\|[^|]*\|[^|]*\|", line)]
PROMISED = {*range(1, 25), *range(26, 35), 40, 41, *range(43, 47), 48, *range(50, 54)}
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))

NO_FAULTS = {  # what else has to work in such runs
    "test_a_run_ends_with_pictures_and_an_encoder_to_export",
    "test_labelled_shards_are_evaluated",
}


def functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_promised_row_is_there():
    assert {int(row.split("|")[1]) for row in ROWS} == PROMISED


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.split('|')[1].strip()}-{i}" for i, row in enumerate(ROWS)])
def test_a_row_says_how_what_and_which_test(row):
    _, fault, how, what, tests = (cell.strip() for cell in row.strip("|").split("|"))
    assert all((fault, how, what))
    assert re.search(r"`tests/[\w/]+\.py::test_\w+`", tests)


@pytest.mark.parametrize("file, name", NAMED, ids=[name for _, name in NAMED])
def test_a_named_test_exists(file, name):
    assert name in functions(ROOT / file)


def test_every_fault_test_on_the_real_command_is_in_the_table():
    """So that a new one is not forgotten there."""
    named = {name for _, name in NAMED}
    elsewhere = {"test_ast.py", "test_table.py"}
    for path in sorted((ROOT / "tests" / "faults").glob("test_*.py")):
        if path.name not in elsewhere:
            missing = {name for name in functions(path) if name.startswith("test_")} - named
            assert missing <= NO_FAULTS, f"{path.name}: docs/reliability.md lacks {missing}"


def test_the_exit_codes_are_those_of_the_code():
    codes = {int(code) for code in re.findall(r"^\| (\d+) \| [^|]+\|$", PAGE, flags=re.MULTILINE)}
    assert codes == {value for name, value in vars(errors).items() if name.isupper() and isinstance(value, int)}


def test_every_injection_that_is_shown_can_be_asked_for():
    from fastmim.engine.injector import _parse

    shown = re.findall(r"`(\w+@\w+=[\d:-]+)`", PAGE)
    assert len(shown) > 15
    for text in shown:
        _parse(text)


def test_no_row_is_lost_to_the_pattern():
    assert len(ROWS) == sum(
        line.startswith("| ") and line.count("|") == 6 and line[2].isdigit() for line in PAGE.splitlines()
    )
