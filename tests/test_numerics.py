"""docs/numerics.md states every error against the published model, none above its tolerance."""

import re
from pathlib import Path

import pytest

from pretrain.testing import load_module

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(r"^\| ([^|]+) \| ([\d.e+-]+) \| ([\d.e+-]+) \| [^|]+ \|$", flags=re.M)
STATED = {
    name: (float(error), float(tolerance))
    for name, error, tolerance in ROW.findall((ROOT / "docs" / "numerics.md").read_text())
}


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    errors: dict[str, float] = load_module(ROOT / "tests" / "golden" / "measure.py").errors()
    return errors


def test_the_table_names_what_is_measured(measured: dict[str, float]) -> None:
    assert measured.keys() == STATED.keys()


@pytest.mark.parametrize("quantity", STATED)
def test_no_error_is_above_its_tolerance(measured: dict[str, float], quantity: str) -> None:
    stated, tolerance = STATED[quantity]
    assert measured[quantity] <= tolerance
    assert stated <= tolerance
