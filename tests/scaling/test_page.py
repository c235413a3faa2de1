"""The tables of docs/scaling.md and the rows behind them are what the model says today."""

import csv
from pathlib import Path

import pytest

from pretrain.testing import load_module

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def generated():
    benchmark = load_module(ROOT / "kernels/benchmarks/scaling.py")
    clusters = benchmark.Clusters()
    rows = benchmark.scope_rows(clusters)
    return benchmark, rows, benchmark.tables(clusters, rows)


def test_the_page_and_its_rows_are_the_generators(generated):
    benchmark, rows, tables = generated
    page = benchmark.PAGE.read_text(encoding="utf-8")
    again = "run python kernels/benchmarks/scaling.py"
    assert page == benchmark.replace_tables(page, tables), again
    with (benchmark.RESULTS / "scaling.csv").open(encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == rows, again


def test_what_the_page_says_of_its_tables_holds(generated):
    benchmark, rows, _ = generated
    speed = {(row["gpus"], row["zero"], row["scope"]): float(row["tokens_per_s"]) for row in rows}
    dealt, step, undealt = benchmark.ROW, benchmark.STEP, "row, independent"
    assert speed["512", "1", step] > speed["512", "1", dealt] > 0.99 * speed["512", "1", step]
    assert 0.6 < speed["512", "1", undealt] / speed["512", "1", dealt] < 0.75
    assert speed["4096", "1", step] > 2 * speed["4096", "1", dealt]
    for gpus in ("8", "512", "4096"):
        assert speed[gpus, "1", dealt] >= speed[gpus, "2", dealt] >= speed[gpus, "3", dealt]


def test_pictures_are_drawn_from_the_same_rows(generated, tmp_path):
    benchmark, rows, _ = generated
    benchmark.plot(rows, benchmark.comparisons(), tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"scaling-idle.png", "scaling-check.png"}
    for name in drawn:
        assert (ROOT / "docs/images" / name).stat().st_size < 100_000
        assert f"images/{name}" in benchmark.PAGE.read_text(encoding="utf-8")
