"""docs/performance.md says of whole steps on several GPUs what results/engine.csv has."""

import csv
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
COMMIT = "f952caa"
# the cards that were timed alone: of the first host, of the second, and in float8
ALONE = {"first": ["67eb8709", "3bbb500d"], "second": ["later-2", "later-3"], "fp8": ["081b39c5"]}


class Line(NamedTuple):
    """A line of the table; a cell has a number for each accumulation or each card."""

    setting: str
    accumulations: list[float]
    speeds: list[float]
    shares: list[float]
    of_one_gpu: list[float]
    peaks: list[float]

    @property
    def key(self) -> tuple[str, str, str]:
        """GPUs, ZeRO stage and precision, as the file has them."""
        stage = re.search(r"ZeRO-(\d)", self.setting)
        return (
            self.setting[0].replace("o", "1"),
            stage[1] if stage else "1",
            "fp8-prefix" if "float8" in self.setting else "bf16",
        )


def numbers(cell: str) -> list[float]:
    # goals are no measurements
    found = re.findall(r"\d{1,3}(?:,\d{3})*(?:\.\d+)?", cell.partition(", goal")[0])
    return [float(number.replace(",", "")) for number in found]


def lines() -> list[Line]:
    section = PAGE[PAGE.index("### Several H200s") :]
    table = section[section.index("\n|---") :].strip().split("\n\n")[0].splitlines()[1:]
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table]
    return [Line(setting, *map(numbers, rest)) for setting, *rest in cells]


@pytest.fixture(scope="module")
def measured() -> list[dict[str, str]]:
    with (ROOT / "kernels/benchmarks/results/engine.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if (row["commit"], row["scope"]) == (COMMIT, "step")]


def share(rows: list[dict[str, str]], key: tuple[str, str, str], count: float, cards: str) -> float:
    (found,) = [
        float(row["share_of_bare"])
        for row in rows
        if (row["gpus"], row["zero"], row["precision"]) == key
        and float(row["accumulation"]) == count
        and row["overlap"] == ("false" if row["zero"] == "3" else "true")
        and cards in row["cards"]
    ]
    return found


@pytest.mark.parametrize("line", lines(), ids=lambda line: f"{line.setting} {line.accumulations}")
def test_a_line_is_what_was_measured(line: Line, measured: list[dict[str, str]]) -> None:
    rows = [
        row
        for row in measured
        if (row["gpus"], row["zero"], row["precision"]) == line.key
        and float(row["accumulation"]) in line.accumulations
    ]
    peaks = line.peaks if len(line.peaks) == len(line.speeds) else line.peaks * len(line.speeds)
    for speed, percent, peak in zip(line.speeds, line.shares, peaks, strict=True):
        # as they are rounded
        assert [
            row
            for row in rows
            if abs(float(row["tokens_per_s_per_gpu"]) - speed) <= 0.5
            and abs(100 * float(row["share_of_bare"]) - percent) <= 0.051
            and abs(float(row["peak_bytes"]) / 1e9 - peak) <= 0.051
        ], (speed, percent, peak)
    host = "second" if "second" in line.setting else "first"
    cards = ALONE["fp8" if line.key[2] == "fp8-prefix" else host]
    pairs = [(count, card) for count in line.accumulations for card in cards]
    if line.key[0] == "1":
        assert not line.of_one_gpu
        return
    wanted = [
        100
        * share(measured, line.key, count, "later" if host == "second" else "")
        / share(measured, ("1", "1", line.key[2]), count, card)
        for count, card in pairs
    ]
    assert line.of_one_gpu == pytest.approx(wanted, abs=0.051)
