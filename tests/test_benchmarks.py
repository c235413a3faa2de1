"""Benchmarks run where there is no GPU, and say of every row what it measured."""

import csv
import importlib
import importlib.util
import os
import subprocess
import sys
from contextlib import ExitStack
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


class TestTune:
    """Everything of the tuning but the clock."""

    @pytest.fixture
    def tune(self, monkeypatch):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("tune")

    def test_every_constant_of_a_sweep_changes_what_is_launched(self, tune, monkeypatch):
        pytest.importorskip("triton", reason="triton is not installed")
        launches = load_module(Path(__file__).parent / "kernels/launches.py")
        # kernels are recorded, so tensors without memory do
        monkeypatch.setattr("pretrain_kernels.dispatch.is_fused", lambda *tensors: True)
        sums = [
            importlib.import_module(f"pretrain_kernels.{name}")
            for name in ("column_sums_triton", "spans_triton")
        ]
        meta = torch.device("meta")

        def launched(sweep, ours, inputs, constants):
            module = importlib.import_module(sweep.module)
            with launches.recorded(module) as found, ExitStack() as stack:
                for other in sums:
                    stack.enter_context(launches.recorded(other))
                tune.under(sweep.module, constants, ours)(inputs)()
            return {
                (launch.kernel.__name__, name, str(value))
                for launch in found
                for name, value in (launch.values | launch.options).items()
                if not isinstance(value, torch.Tensor)
            }

        for sweep in tune.SWEEPS:
            [case] = [case for case in tune.all_cases() if case.op == sweep.op]
            inputs, used = case.make(case.check_size or case.size, meta), sweep.in_use()
            ours = case.providers["ours"]
            before = launched(sweep, ours, inputs, used)
            assert before, sweep.op
            for name, values in sweep.axes.items():
                assert used[name] in values, f"{sweep.op}: {name}={used[name]} is not tried"
                for value in set(map(str, values)) - {str(used[name])}:
                    other = next(each for each in values if str(each) == value)
                    after = launched(sweep, ours, inputs, {**used, name: other})
                    assert after != before, f"{sweep.op}: {name}={value} changes nothing"
            assert sweep.in_use() == used

    def test_candidates_are_checked_beside_eager(self, tune):
        sweep = next(sweep for sweep in tune.SWEEPS if sweep.op == "quantize_both_ways")
        case = tune.with_candidates(sweep)
        names = list(case.providers)
        # what is in use comes first, and once
        assert names[:2] == ["eager", "ROWS=64 COLUMNS=128 NUM_WARPS=4"]
        assert len(names) == len(set(names)) == 1 + 2 * 2 * 3

    def test_without_a_gpu_it_says_so(self):
        done = subprocess.run(
            [sys.executable, BENCHMARKS / "tune.py"],
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
