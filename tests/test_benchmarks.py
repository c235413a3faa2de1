"""Benchmarks run where there is no GPU, and say of every row what it measured."""

import csv
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

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


SMALL = {
    "tokens": 40, "width": 96, "inner": 80, "heads": 4, "head_width": 24, "vocabulary": 300,
    "elements": 10_000,
}  # fmt: skip
# what runs on a CPU as it runs on a GPU
ON_CPU = ("ours", "eager", "torch", "mm, add", "FA2", "torch fused")


class TestMicro:
    """Everything of the micro-benchmarks but the clock, which needs a GPU."""

    @pytest.fixture
    def cases(self, monkeypatch):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        from micro_ops import core, products, updates
        from micro_ops.case import Sizes

        sizes = Sizes(**SMALL)
        found = {}
        for case in (*core.cases(sizes), *updates.cases(sizes), *products.cases(sizes)):
            providers = {name: case.providers[name] for name in ON_CPU if name in case.providers}
            if providers and "fp8, row-wise" not in case.op:
                found[f"{case.op} {case.shape}"] = replace(case, providers=providers)
        return found

    def test_every_provider_agrees_with_float64(self, cases):
        from micro_ops.check import find_faults

        ops = set()
        for case in cases.values():
            # of its own, so that one more case changes no other's numbers
            torch.manual_seed(0)
            assert find_faults(case, torch.device("cpu")) == {}, case.op
            ops.add(case.op)
        assert ops == {
            "rms_norm", "rms_norm backward", "norm_chain", "norm_chain backward", "qk_rope",
            "qk_rope backward", "swiglu", "swiglu backward", "quantize_rows",
            "quantize_both_ways", "norm_chain fp8", "swiglu fp8", "cross_entropy nats",
            "cross_entropy gradient", "ellis_adam", "adamw with norms",
            "linear_cross_entropy both ways", "gemm", "weight gradient, float32 sum",
            "attention", "attention backward",
        }  # fmt: skip

    def test_a_wrong_provider_is_found(self, cases):
        from micro_ops.check import find_faults

        for case in cases.values():
            name, prepare = next(iter(case.providers.items()))

            def spoiled(inputs, prepare=prepare):
                run = prepare(inputs)

                def one_element_is_nan():
                    first, *others = run()
                    first = first.clone(memory_format=torch.contiguous_format)
                    first.view(-1)[0] = torch.nan
                    return first, *others

                return one_element_is_nan

            wrong = replace(case, providers=case.providers | {name: spoiled})
            faults = find_faults(wrong, torch.device("cpu"))
            assert "output 0 is off by nan" in faults[name], case.op

    def test_without_a_gpu_it_says_so(self):
        done = subprocess.run(
            [sys.executable, BENCHMARKS / "micro.py"],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 3
        assert "needs a CUDA GPU" in done.stderr


def test_the_page_of_kernels_says_what_was_measured():
    """Each cell of its table is in the CSV, in the row of that op, shape and provider."""
    with (BENCHMARKS / "results/micro.csv").open() as file:
        kept = list(csv.DictReader(file))
    page = (BENCHMARKS.parent / "README.md").read_text()
    table = page[page.index("| op | shape | ours") :].split("\n\n")[0].splitlines()
    seen = set()
    for line in table[2:]:
        op, shape, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows = [row for row in kept if (row["op"], row["shape"]) == (op, shape)]
        columns = ("ours", "eager", "torch.compile", "liger")
        for provider, cell in zip(columns, cells[:4], strict=True):
            times = [row["median_us"] for row in rows if row["provider"] == provider]
            assert cell in times or (cell == "–" and not times), (op, provider, cell)
        assert cells[4] in [row["limit_share"] for row in rows if row["provider"] == "ours"], op
        seen.add((op, shape))
    wanted = {(row["op"], row["shape"]) for row in kept if row["provider"] == "ours"}
    assert seen == wanted
