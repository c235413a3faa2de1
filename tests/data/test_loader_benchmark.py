"""The benchmark of the loader measures nothing that it has not found right."""

import csv
import re
from pathlib import Path

import pytest

from pretrain.testing import load_module

PROGRAM = Path(__file__).parents[2] / "kernels/benchmarks/loader.py"
COLUMNS = (
    "op", "shape", "dtype", "median_us", "p20", "p80", "rows_per_s", "ratio", "ratio_p20",
    "ratio_p80", "cpu", "python", "torch", "webdataset", "commit",
)  # fmt: skip


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """The program, with little to read."""
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    module = load_module(PROGRAM)
    for name, value in {
        "SHARDS": 2,
        "MEMBERS_PER_SHARD": 2,
        "ROWS_PER_MEMBER": 16,
        "CONTEXT": 512,
        "REPEATS": 2,
        "TABLE": tmp_path / "results/loader.csv",
        "NEEDS": tmp_path / "results/loader-needs.csv",
    }.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_each_run_appends_a_row_for_each_reader(benchmark, capsys):
    benchmark.main()
    benchmark.main()
    with benchmark.TABLE.open() as file:
        rows = list(csv.DictReader(file))
    names = ["pretrain stream_batches", "webdataset, a row per member", *benchmark.OTHERS]
    assert [row["op"] for row in rows] == names * 2
    for row in rows:
        assert tuple(row) == COLUMNS
        assert 0 < float(row["p20"]) <= float(row["median_us"]) <= float(row["p80"])
        assert row["commit"]
        # any other reader may be as fast by chance
        assert float(row["ratio"]) == 1.0 if row["op"] == names[1] else float(row["ratio"]) > 0
    said = capsys.readouterr().out
    (ratio,) = re.findall(r"reads ([\d.]+) times as many rows/s", said.splitlines()[-2])
    # said with two digits, kept with three
    assert abs(float(ratio) - float(rows[len(names)]["ratio"])) < 0.0056
    with benchmark.NEEDS.open() as file:
        needs = list(csv.DictReader(file))
    assert [need["preset"] for need in needs] == ["huginn-3.5b", "huginn-100m"] * 2


def test_a_reader_of_other_rows_is_not_measured(benchmark, monkeypatch):
    read = benchmark.read_plain
    monkeypatch.setattr(
        benchmark, "read_plain", lambda *arguments: (batch + 1 for batch in read(*arguments))
    )
    with pytest.raises(SystemExit, match="does not read the rows that were packed"):
        benchmark.main()
    assert not benchmark.TABLE.exists()
