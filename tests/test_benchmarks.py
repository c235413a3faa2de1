"""Benchmarks run where there is no GPU, and say of every row what it measured."""

import csv
import importlib.util
from dataclasses import replace
from pathlib import Path

from pretrain.testing import load_module

BENCHMARKS = Path(__file__).parent.parent / "kernels/benchmarks"


def test_generation_is_measured_beside_transformers_or_says_why_not(tmp_path):
    benchmark = load_module(BENCHMARKS / "generation.py")
    plan = replace(benchmark.ON_CPU, batches=(2,), seconds=0.0)
    benchmark.main(plan, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = [row for row in rows if "skipped" not in row["op"]]
    for row in measured:
        assert 0 < float(row["p20"]) <= float(row["median_us"]) <= float(row["p80"])
        assert float(row["tokens_per_s"]) > 0
    kinds = {" ".join(row["op"].split(",")[0].split()[:2]) for row in measured}
    assert {"pretrain", "pretrain adaptive", "pretrain draft", "pretrain without"} <= kinds
    is_there = importlib.util.find_spec("transformers") is not None
    assert ("transformers generate" in kinds) == is_there
    assert is_there or "not installed" in rows[-1]["op"]
