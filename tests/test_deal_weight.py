"""What the deal's weight costs is what its program finds, and what EXPERIMENTS.md says."""

import csv
import re
from pathlib import Path

import pytest

from pretrain.testing import load_module

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "kernels/benchmarks"
COLUMNS = ("bf16", "fp8-prefix", "fp8")


@pytest.fixture(scope="module")
def kept() -> list[dict[str, str]]:
    with (BENCHMARKS / "results/deal-weight.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_program_finds_the_kept_rows_again(kept, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    program = load_module(BENCHMARKS / "deal_weight.py")
    passes = {row["precision"]: row["passes_of"] for row in kept}
    found = {
        precision: fit
        for precision, fit in program.fits(program.RESULTS / "step.csv").items()
        if passes.get(precision) == fit[1]
    }
    # newer passes ask for newer rows
    assert list(found) == list(passes)
    wanted = [row for row in kept if (row["preset"], row["ranks"]) == ("huginn-3.5b", "64")]
    rows = list(program.waits("huginn-3.5b", 64, found))
    assert [{key: str(value) for key, value in row.items()} for row in rows] == wanted


def test_the_table_of_the_page_is_that_of_the_rows(kept):
    page = (ROOT / "EXPERIMENTS.md").read_text(encoding="utf-8")
    _, _, behind = page.partition("| ranks | bf16 | float8 prefix | float8 |\n")
    lines = re.findall(r"^  \| (\d+) \| (.+) \|$", behind.partition("\n\n")[0], flags=re.M)
    waits = {
        (row["ranks"], row["precision"], row["weight"]): row["wait_percent"]
        for row in kept
        if row["preset"] == "huginn-3.5b"
    }
    for ranks, cells in lines:
        assert cells.split(" | ") == [
            f"{waits[ranks, name, '4']} / {waits[ranks, name, '3']}" for name in COLUMNS
        ]
    assert {ranks for ranks, _ in lines} == {ranks for ranks, *_ in waits}
