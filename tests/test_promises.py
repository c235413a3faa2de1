"""Every promise of docs/reliability.md names tests, and every test that it names exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.*?) \| (`tests/.*`) \|$", PAGE, flags=re.M)


def test_there_are_the_eight_promises() -> None:
    assert len(ROWS) == 8


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:40])
def test_a_promise_names_tests_that_exist(row: tuple[str, str]) -> None:
    names = re.findall(r"`([^`]+)`", row[1])
    assert len(names) >= 3
    for name in names:
        path, _, function = name.partition("::")
        body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
        assert any(other.startswith("test_") for other in functions)
        assert not function or function in functions, name
