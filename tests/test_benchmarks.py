"""Benchmarks run where there is no GPU, and say of every row what it measured."""

import csv
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex

from conftest import SMALL as SMALL_RUN
from pretrain.compose import load
from pretrain.model.depth import Depth, step_depths
from pretrain.testing import load_module
from pretrain_kernels import dispatch

BENCHMARKS = Path(__file__).parent.parent / "kernels/benchmarks"


def test_generation_is_measured_beside_transformers_or_says_why_not(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
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
ON_CPU = (
    "ours", "eager", "torch", "mm, add", "FA2", "math", "FlexAttention", "dense mask",
    "torch fused",
)  # fmt: skip


def cpu_scales_rows_of_float8() -> bool:
    """torch 2.11 refuses it on a CPU, 2.13 does it."""
    rows, scales = torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(rows, rows.t(), scales, scales.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


class TestMicro:
    """Everything of the micro-benchmarks but the clock, which needs a GPU."""

    @pytest.fixture
    def cases(self, monkeypatch):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        from micro_ops import attention, core, products, updates
        from micro_ops.case import Sizes

        # torch refuses gradients of FlexAttention on a CPU, where its compiled kernel has none
        monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
        sizes = Sizes(**SMALL)
        found = {}
        for case in chain.from_iterable(
            part.cases(sizes) for part in (core, attention, updates, products)
        ):
            providers = {name: case.providers[name] for name in ON_CPU if name in case.providers}
            if providers and ("float8" not in str(case.dtype) or cpu_scales_rows_of_float8()):
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
        if not cpu_scales_rows_of_float8():
            ops.add("gemm fp8, row-wise")
        assert ops == {
            "rms_norm", "rms_norm backward", "norm_chain", "norm_chain backward", "qk_rope",
            "qk_rope backward", "swiglu", "swiglu backward", "quantize_rows", "quantize_both_ways",
            "norm_chain fp8", "swiglu fp8", "cross_entropy nats", "cross_entropy gradient",
            "ellis_adam", "ellis_adam clipped and rounded", "add_gradient first", "add_gradient",
            "square_sums", "adamw with norms", "linear_cross_entropy both ways", "gemm",
            "gemm fp8, row-wise", "weight gradient, float32 sum", "attention", "attention backward",
            "attention in documents", "attention in documents backward",
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

    def test_documents_that_see_each_other_are_found(self, cases):
        from micro_ops.check import find_faults

        found = {case.op: case for case in cases.values() if case.op.startswith("attention")}
        for suffix in ("", " backward"):
            causal, isolated = found[f"attention{suffix}"], found[f"attention in documents{suffix}"]
            wrong = replace(isolated, providers={"FA2": causal.providers["FA2"]})
            assert "output 0 is off" in find_faults(wrong, torch.device("cpu"))["FA2"]

    def test_a_case_that_fails_is_red_and_the_others_go_on(self, monkeypatch):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        micro = importlib.import_module("micro")
        monkeypatch.setattr(micro, "environment", dict)
        measured = []

        def rows_of(case, best, device, seconds):
            if case.op == "swiglu":
                raise RuntimeError("Offset increment outside graph capture\nand more")
            if case.op == "swiglu backward":
                raise torch.OutOfMemoryError("tried to allocate 200 GiB")
            measured.append(case.op)
            yield dict.fromkeys(micro.COLUMNS, "")

        monkeypatch.setattr(micro, "rows_of", rows_of)
        found = [row for row in micro.rows("swiglu", 60, torch.device("cpu")) if "fault" in row]
        assert [(row["op"], row["provider"]) for row in found] == [
            ("swiglu", "ours"), ("swiglu backward", "all"),
        ]  # fmt: skip
        assert found[0]["fault"] == "not measured: Offset increment outside graph capture"
        assert "swiglu fp8" in measured

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_random_numbers_go_on_after_a_capture_that_failed(self, monkeypatch):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        clock = importlib.import_module("micro_ops.clock")
        with torch.cuda.stream(torch.cuda.Stream()):
            # reads a number on the host, which no graph can hold
            again = clock.repeater("sum", [lambda: torch.randn(4, device="cuda").sum().item()])
            assert len({*again(), *again()}) == 2
            assert torch.randn(4, device="cuda").isfinite().all()

    def test_without_a_gpu_it_says_so(self):
        done = subprocess.run(
            [sys.executable, BENCHMARKS / "micro.py"],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 3
        assert "needs a CUDA GPU" in done.stderr


class TestStep:
    """Passes of the tiny model on a CPU, whose speed says nothing and is kept nowhere."""

    WORDS = (
        "device=cpu", "presets=tiny", "paths=fused", "no_grad=1", "with_grad=1", "seconds=0",
    )  # fmt: skip

    @pytest.fixture
    def step(self, monkeypatch):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        import step_parity

        # few tokens, whose gradients scatter more, as those of the rounding test do
        monkeypatch.setattr(step_parity, "TOKENS", 64)
        monkeypatch.setattr(step_parity, "RATIO", 2.0)
        return load_module(BENCHMARKS / "step.py")

    def read(self, path: Path) -> list[dict[str, str]]:
        with path.open() as file:
            return list(csv.DictReader(file))

    def test_a_pass_without_a_kernel_stands_between_two_with_all(self, step, tmp_path, caplog):
        dispatch._announce.cache_clear()
        words = [*self.WORDS, "parity=0", "without=swiglu", f"results={tmp_path}"]
        assert step.main(words) == 0
        warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert warned == ["swiglu on cpu runs as PyTorch, because PRETRAIN_KERNELS_OFF names it"]
        assert "PRETRAIN_KERNELS_OFF" not in os.environ
        rows = self.read(tmp_path / "ablation.csv")
        assert [row["without"] for row in rows] == ["", "swiglu", ""]
        rates = [float(row["tokens_per_s_per_gpu"]) for row in rows]
        shares = [float(row["share_of_all_kernels"]) for row in rows]
        assert shares == pytest.approx([2 * r / (rates[0] + rates[2]) for r in rates], abs=1e-4)
        kept = [row["tokens_per_s_per_gpu"] for row in self.read(tmp_path / "step.csv")]
        assert kept == [rows[0]["tokens_per_s_per_gpu"], rows[2]["tokens_per_s_per_gpu"]]

    def test_a_path_that_is_wrong_has_no_speed(self, step, tmp_path, monkeypatch, capsys):
        from pretrain_kernels.swiglu import reference

        torch.manual_seed(0)
        assert step.main([*self.WORDS, f"results={tmp_path}"]) == 0
        assert len(self.read(tmp_path / "step.csv")) == 1
        assert ": passes" in capsys.readouterr().out
        right = reference.swiglu
        monkeypatch.setattr(reference, "swiglu", lambda *args, **more: -right(*args, **more))
        assert step.main([*self.WORDS, f"results={tmp_path}"]) == 1
        said = capsys.readouterr().out
        assert "tiny fused, precision without and with gradient same-same: FAILS" in said
        assert "tokens/s" not in said
        assert len(self.read(tmp_path / "step.csv")) == 1

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["without=norms"], "without=norms names norms; the ops are adamw"),
            (["without=swiglu", "paths=compiled"], "paths=compiled has none"),
            (["preset=tiny"], "preset=tiny is no option"),
            (["held=1", "paths=fused,fused+fp8"], "paths=fused,fused.fp8 has others"),
        ],
    )
    def test_what_means_nothing_is_refused(self, step, words, reason):
        with pytest.raises(SystemExit, match=reason):
            step.main(words)

    def test_float8_copies_are_made_anew_and_held_in_turn(self, step, tmp_path, monkeypatch):
        from pretrain.model.fused import weights

        made: list[int] = []
        quantize = weights.quantize_rows
        monkeypatch.setattr(weights, "quantize_rows", lambda w: made.append(0) or quantize(w))
        measured, counts = step.measure, []

        def counted(*args):
            made.clear()
            row = measured(*args)
            counts.append(len(made))
            return row

        monkeypatch.setattr(step, "measure", counted)
        words = [*self.WORDS, "paths=fused+fp8", "parity=0", "held=2", f"results={tmp_path}"]
        assert step.main(words) == 0
        rows = self.read(tmp_path / "held.csv")
        assert [row["copies"] for row in rows] == ["anew", "held"] * 2
        # two passes to warm up and one that is timed
        assert counts[1] == counts[3] == 3 * counts[2] > 0


class TestEngine:
    """Optimizer steps against bare passes, whose seconds are given here: a + b n + c k."""

    A, B, C = 1e-3, 2e-4, 5e-4
    OPTIONS = ("preset=tiny", "gpus=2", "zero=2", "accumulation=2", "path=fused", "seconds=0")
    OVERRIDES = tuple(word for word in SMALL_RUN if word.startswith(("data", "model.", "depth.")))

    @pytest.fixture
    def engine(self, monkeypatch):
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        return load_module(BENCHMARKS / "engine.py")

    def write_bare(self, folder: Path, depths) -> None:
        row = {
            "preset": "tiny", "path": "fused", "precision": "bf16", "rows": 1, "gpus": 1, "zero": 0,
            "accumulation": 1, "gpu": "cpu", "kept_iterations": "",
        }  # fmt: skip
        with (BENCHMARKS / "results/step.csv").open() as file:
            columns = next(csv.reader(file))
        with (folder / "step.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for n, k in depths:
                rate = repr(32 / (self.A + self.B * n + self.C * k))
                about = {"no_grad": n, "with_grad": k, "tokens_per_s_per_gpu": rate}
                writer.writerow(row | about)

    def run(self, workspace: Path, *words: str):
        return subprocess.run(
            [sys.executable, BENCHMARKS / "engine.py", *self.OPTIONS, *self.OVERRIDES, *words],
            cwd=workspace, capture_output=True, text=True, check=False, timeout=600,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def test_two_ranks_train_and_are_held_against_bare_passes(self, workspace, tmp_path):
        self.write_bare(tmp_path, [(0, 2), (4, 2), (2, 1)])
        done = self.run(workspace, f"results={tmp_path}", f"runs={tmp_path}/runs")
        assert done.returncode == 0, done.stdout + done.stderr
        with (tmp_path / "engine.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert (row["gpus"], row["zero"], row["accumulation"]) == ("2", "2", "2")
        (run_dir,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
        lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        assert row["warm_steps"] == "2"
        steps = [line for line in lines if line.get("step", 0) > 2][: int(row["steps"])]
        config = load("train", list(self.OVERRIDES), resumes=False)
        even = wait = 0.0
        for step in steps:
            assert step["data/rows"] == 4
            depths = step_depths(config.depth, seed=0, first_row=step["data/first_row"], rows=4)
            costs = [self.A + self.B * d.no_grad + self.C * d.with_grad for d in depths]
            even += sum(costs) / 2
            first, second = sorted(costs[:2]), sorted(costs[2:])
            wait += sum(map(max, first, second))
        seconds = sum(step["speed/step_s"] for step in steps)
        parts = [row[f"{part}_s"] for part in ("data", "forward", "backward", "wait", "update")]
        assert sum(map(float, parts)) == pytest.approx(seconds / len(steps), rel=0.02, abs=3e-4)
        assert float(row["share_of_bare"]) == pytest.approx(even / seconds, abs=1e-4)
        assert float(row["share_less_wait"]) == pytest.approx(wait / seconds, abs=1e-4)
        assert float(row["fit_c_s"]) == pytest.approx(self.C, abs=1e-5)
        with (tmp_path / "step.csv").open() as file:
            assert list(csv.DictReader(file))[-1]["zero"] == "2"

    def test_too_few_bare_passes_are_named_before_anything_runs(self, workspace, tmp_path):
        self.write_bare(tmp_path, [(0, 2), (4, 2)])
        done = self.run(workspace, f"results={tmp_path}", f"runs={tmp_path}/runs")
        assert done.returncode == 1
        assert "has 2 depths with preset=tiny, path=fused, precision=bf16" in done.stderr
        assert not list((tmp_path / "runs").iterdir())

    def test_ranks_wait_once_a_step_or_at_every_micro_step(self, engine):
        bare = engine.BarePass(np.array([0.0, 1.0, 0.0]), 0.0)
        depths = [Depth(n, 1) for n in (1, 9, 6, 5)]
        assert bare.of_step(depths, gpus=2, zero=1) == (10.5, 11.0)
        assert bare.of_step(depths, gpus=2, zero=2) == (10.5, 9.0 + 5.0)

    def test_only_a_row_alike_on_one_gpu_is_compared(self, engine, tmp_path):
        row = {
            "scope": "step", "path": "fused", "precision": "bf16", "accumulation": 4,
            "kept_iterations": "", "cards": "", "gpu": "x", "gpus": 1, "share_of_bare": 0.9,
            "fit_a_s": 0.1, "fit_b_s": 0.02, "fit_c_s": 0.07,
        }  # fmt: skip
        two = row | {"gpus": 2, "share_of_bare": 0.882}
        table = tmp_path / "engine.csv"
        assert engine.against_one_gpu(table, two) is None
        for other in (row, row | {"scope": "row", "share_of_bare": 0.5}, two):
            engine.append(table, other)
        assert engine.against_one_gpu(table, two) == 0.98

    def test_the_slowest_of_the_same_cards_is_compared(self, engine, tmp_path):
        alike = {
            "scope": "step", "path": "fused", "precision": "bf16", "accumulation": 4,
            "kept_iterations": "", "gpu": "x", "fit_a_s": 0.1, "fit_b_s": 0.02, "fit_c_s": 0.07,
        }  # fmt: skip
        table = tmp_path / "engine.csv"
        alone = [("a", 0.5), ("a", 0.99), ("b", 0.98), ("c", 0.97)]
        for card, share in alone:
            engine.append(table, alike | {"cards": card, "gpus": 1, "share_of_bare": share})

        def against(cards):
            row = alike | {"cards": cards, "gpus": 2, "share_of_bare": 0.95}
            return engine.against_one_gpu(table, row)

        assert against("a b") == round(0.95 / 0.98, 4)
        assert against("a d") == round(0.95 / 0.99, 4)
        assert against("d e") == round(0.95 / 0.97, 4)
        # a larger share of passes that are slower by a tenth
        slow = {"fit_a_s": 0.11, "fit_b_s": 0.022, "fit_c_s": 0.077}
        engine.append(table, alike | slow | {"cards": "f", "gpus": 1, "share_of_bare": 1.0})
        assert against("a f") == round(0.95 * 1.1, 4)


def test_runs_that_are_compared_take_the_paths_of_their_names(monkeypatch):
    """Whatever the preset's own path is."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    convergence = importlib.import_module("convergence")
    found = {}
    for name in convergence.RUNS:
        model = load("train", convergence.run_words(name, 0, 8192), resumes=False).model
        found[name] = tuple(
            choice.value for choice in (model.path, model.no_grad_precision, model.grad_precision)
        )
    assert found == {
        "reference": ("reference", "same", "same"),
        "reference again": ("reference", "same", "same"),
        "fused": ("fused", "same", "same"),
        "fused again": ("fused", "same", "same"),
        "fused, fp8 without gradient": ("fused", "fp8", "same"),
        "fused, fp8 everywhere": ("fused", "fp8", "fp8"),
    }


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
    """Each cell of its table is in the newest row of that op, shape and provider."""
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
            times = [row["median_us"] for row in rows if row["provider"] == provider] or ["–"]
            assert cell == times[-1], (op, provider)
        ours = [row["limit_share"] for row in rows if row["provider"] == "ours"]
        assert cells[4] == ours[-1], op
        seen.add((op, shape))
    wanted = {(row["op"], row["shape"]) for row in kept if row["provider"] == "ours"}
    assert seen == wanted


def test_the_readme_says_the_speeds_that_its_picture_shows(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    text = (BENCHMARKS.parents[1] / "README.md").read_text()
    for name, speed in importlib.import_module("overview").speeds().items():
        assert f"{round(speed, -1):,.0f}" in text, name
