"""`make bench` ends when it is told to, refuses at once what it cannot do, and loses no row."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from pretrain.model.depth import Depth
from pretrain.testing import load_module

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "kernels/benchmarks"
# of step.py: passes of a tiny model on a CPU, as few as there can be
QUICK = ("device=cpu", "presets=tiny", "no_grad=1", "with_grad=1", "seconds=0", "parity=0")


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def beside_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestRecipe:
    def make(self, folder: Path, seconds: str, *, failing: str = "nothing"):
        """`make bench` with a program in the place of Python that writes down what it is given."""
        python = folder / "python"
        python.write_text(
            f'#!/bin/sh\necho "$@" >> "{folder}/called"\ncase $1 in *{failing}) exit 3;; esac\n'
        )
        python.chmod(0o755)
        # newer than what an installation depends on
        (folder / "installed").touch()
        words = ["make", "--silent", "bench", f"STAMP={folder}/installed", f"BIN={folder}"]
        done = subprocess.run(
            [*words, f"BENCH_SECONDS={seconds}"],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        called = folder / "called"
        return done, called.read_text().splitlines() if called.exists() else []

    @pytest.mark.parametrize("seconds", ["abc", "0", "", "0.5", "5 5", "08", "-1"])
    def test_seconds_that_mean_nothing_are_refused_before_anything_runs(self, tmp_path, seconds):
        done, called = self.make(tmp_path, seconds)
        assert done.returncode != 0
        assert f"BENCH_SECONDS={seconds} must be a whole number from 1 on." in done.stderr
        assert called == []

    @pytest.mark.parametrize(("seconds", "half"), [("20", "10"), ("5", "3"), ("1", "1")])
    def test_the_small_model_gets_half_of_the_seconds_and_never_none(self, tmp_path, seconds, half):
        done, called = self.make(tmp_path, seconds)
        assert done.returncode == 0, done.stderr
        asked = [line.rsplit("seconds=", 1)[1] for line in called if "step.py" in line]
        assert asked == [seconds, half]

    def test_benchmarks_behind_one_that_fails_run_and_the_end_is_red(self, tmp_path):
        done, called = self.make(tmp_path, "5", failing="micro.py")
        assert done.returncode != 0
        programs = [Path(line.split()[0]).name for line in called]
        assert programs == ["loader.py", "-c", "micro.py", "step.py", "step.py"]


class TestTables:
    def test_what_cannot_be_written_is_said_before_it_is_measured(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        lost = tmp_path / "file/rows.csv"
        said = "file/.*csv cannot be written"
        loader = load_module(BENCHMARKS / "loader.py")
        monkeypatch.setattr(loader, "NEEDS", lost)
        with pytest.raises(SystemExit, match=said):
            loader.main()
        step = load_module(BENCHMARKS / "step.py")
        with pytest.raises(SystemExit, match=said):
            step.main([*QUICK, f"results={tmp_path}/file"])

    def test_to_ask_leaves_tables_as_they_are(self, tmp_path):
        measurements = load_module(BENCHMARKS / "measurements.py")
        old, new = tmp_path / "old.csv", tmp_path / "folder/new.csv"
        old.write_text("a,b\n1,2\n")
        measurements.check_writable(old, new)
        assert old.read_text() == "a,b\n1,2\n"
        assert not new.exists()
        measurements.append(new, {"a": 1, "b": 2})
        assert new.read_text().splitlines() == ["a,b", "1,2"]


@pytest.mark.parametrize("program", ["micro", "tune"])
def test_an_op_that_is_not_there_is_refused_with_those_that_are(program, capsys):
    main = load_module(BENCHMARKS / f"{program}.py").main
    with pytest.raises(SystemExit) as ended:
        main(["--only", "norm_chian"])
    assert ended.value.code == 2
    assert "--only norm_chian is in no name of" in (said := capsys.readouterr().err)
    assert "norm_chain backward" in said


class TestLoader:
    def test_no_server_outlives_an_interruption(self, tmp_path):
        loader = load_module(BENCHMARKS / "loader.py")
        before = set(threading.enumerate())
        with pytest.raises(KeyboardInterrupt), loader.served(tmp_path):
            raise KeyboardInterrupt
        assert set(threading.enumerate()) == before


class TestStep:
    @pytest.fixture
    def step(self):
        return load_module(BENCHMARKS / "step.py")

    @pytest.mark.parametrize(
        ("word", "meaning"),
        [
            ("seconds=abc", "a number from 0 on"), ("seconds=nan", "a number from 0 on"),
            ("rows=0", "numbers from 1 on"), ("rows=", "numbers from 1 on"),
            ("paths=fused,fuse", "some of reference, compiled, fused, fused.fp8"),
            ("paths=compiled+fp8", "some of reference"), ("paths=fused+fp16", "some of reference"),
            ("depths=8/8,56-8", "as 8/8,56/8"), ("depths=2/8/1", "as 8/8,56/8"),
            ("kept=-1", "or nothing for all"), ("parity=yes", "0 or 1"),
            ("profile=compiled", "some of the paths that are measured"),
        ],
    )  # fmt: skip
    def test_a_word_that_means_nothing_is_refused_with_what_it_may_be(self, step, word, meaning):
        with pytest.raises(SystemExit, match=f"means nothing; it takes .*{meaning}"):
            step.main([*QUICK, "paths=fused", word])

    def test_an_experiment_that_is_not_there_is_named_before_others_are_measured(self, step):
        with pytest.raises(SystemExit, match="experiment=huginn-9b: experiment is one of"):
            step.main([*QUICK, "presets=tiny,huginn-9b"])

    def test_a_card_that_is_too_small_ends_one_measurement(
        self, step, tmp_path, monkeypatch, capsys
    ):
        measured = step.measure

        def measure(model, path, depth, rows, seconds):
            if rows == 2 or depth == Depth(3, 1):
                raise torch.OutOfMemoryError("tried to allocate 200 GiB\nand more")
            return measured(model, path, depth, rows, seconds)

        monkeypatch.setattr(step, "measure", measure)
        words = [*QUICK, "paths=reference,fused", "rows=1,2", f"results={tmp_path}"]
        assert step.main([*words, "depths=3/1,0/1"]) == 0
        kept = [(row["path"], row["rows"], row["no_grad"]) for row in read(tmp_path / "step.csv")]
        assert kept == [(path, "1", n) for path in ("reference", "fused") for n in "10"]
        said = capsys.readouterr().out
        assert "tiny fused, 2 rows: not measured: tried to allocate 200 GiB\n" in said
        assert "tiny fused, 1 row, 3/1: not measured" in said

    def test_a_path_whose_check_does_not_fit_costs_no_other(self, step, tmp_path, monkeypatch):
        def check(config, *_):
            if config.path.value == "reference":
                raise torch.OutOfMemoryError("tried to allocate 200 GiB")
            return True

        monkeypatch.setattr(step, "check_path", check)
        words = [*QUICK, "parity=1", "paths=reference,fused", f"results={tmp_path}"]
        assert step.main(words) == 0
        assert [row["path"] for row in read(tmp_path / "step.csv")] == ["fused"]

    def test_float8_that_is_far_from_bf16_has_no_speed(self, step, tmp_path, monkeypatch, capsys):
        import step_parity
        from pretrain.model.fused import weights

        monkeypatch.setattr(step_parity, "PREFIXES", (2,))
        # whose gradients are compared elsewhere
        monkeypatch.setattr(step, "check_path", lambda *_: True)
        torch.manual_seed(0)
        words = [*QUICK, "parity=1", "paths=fused+fp8", f"results={tmp_path}"]
        assert step.main(words) == 0
        assert len(read(tmp_path / "step.csv")) == 1
        quantize = weights.quantize_rows

        def coarse(matrix):
            narrow = quantize(matrix)
            return narrow._replace(scale_N1=narrow.scale_N1 * torch.rand_like(narrow.scale_N1))

        monkeypatch.setattr(weights, "quantize_rows", coarse)
        assert step.main(words) == 1
        assert "tiny: FAILS; cosines must be 0.999 at least" in capsys.readouterr().out
        assert len(read(tmp_path / "step.csv")) == 1

    def test_what_a_row_takes_is_fitted_to_its_depths(self, step, tmp_path, monkeypatch, capsys):
        a, b, c = 0.09, 0.02, 0.07

        def measure(model, path, depth, rows, seconds):
            row = {"rows": rows, "no_grad": depth.no_grad, "with_grad": depth.with_grad}
            seconds = a + b * depth.no_grad + c * depth.with_grad
            return row | {"tokens_per_s_per_gpu": model.config.context * rows / seconds}

        monkeypatch.setattr(step, "measure", measure)
        words = [*QUICK, "paths=fused", "rows=2,1", f"results={tmp_path}"]
        step.main([*words, "depths=8/1,1/4"])
        fit = "tiny fused: a row takes 90.0 + 20.00 n + 70.00 k ms, largest residual 0.00%"
        assert fit in capsys.readouterr().out
        # two depths do not tell three numbers
        step.main([*words, "depths=8/1"])
        assert "a row takes" not in capsys.readouterr().out

    def test_the_other_convention_counts_all_pairs_of_attention(self, step):
        config = step.experiment("huginn-3.5b")
        depth, tokens = Depth(24, 8), config.context
        layers = 4 + 4 * 32
        # forward once: scores and mixture of every query with every key, or with those it may see
        every = layers * 2 * 2 * config.width * tokens
        seen = layers * 2 * 2 * config.width * (tokens + 1) / 2
        # backward: two forward passes more of the layers that have gradient
        graded = (4 + 4 * 8) / layers
        more = (every - seen) * (1 + 2 * graded)
        assert step.pairs_nobody_sees(config, depth) == pytest.approx(more, rel=1e-12)

    def test_an_interruption_leaves_whole_rows(self, tmp_path):
        rows = "rows=" + ",".join(["1"] * 500)
        running = subprocess.Popen(
            [sys.executable, BENCHMARKS / "step.py", *QUICK, "paths=fused", rows,
             f"results={tmp_path}"],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            # what a shell starts in the background ignores it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        table, deadline = tmp_path / "step.csv", time.monotonic() + 200
        while running.poll() is None and not (table.exists() and len(read(table)) > 1):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
        assert running.returncode == -signal.SIGINT, said
        assert "KeyboardInterrupt" in said
        assert table.read_text().endswith("\n")
        for row in read(table):
            assert None not in row.values()
            assert None not in row


# of a profile, to which the kernels of each op are counted
CLASSES = {
    "norm_chain": {"norm chain"}, "qk_rope": {"rotary and SwiGLU"},
    "swiglu": {"rotary and SwiGLU", "quantize"}, "quantize_rows": {"quantize"},
    "quantize_both_ways": {"quantize"}, "linear_cross_entropy": {"cross-entropy"},
    "ellis_adam": {"optimizer"}, "adamw": {"optimizer"}, "square_sums": {"optimizer"},
    "add_gradient": {"optimizer"},
}  # fmt: skip


class TestProfile:
    """Which part of a step a kernel is counted to; kernels are named by what they belong to."""

    @pytest.fixture
    def class_of(self):
        return load_module(BENCHMARKS / "step_profile.py").class_of

    def test_each_kernel_of_ours_is_counted_to_its_op(self, class_of):
        found, names = {}, []
        for path in (ROOT / "kernels/pretrain_kernels").glob("*/triton.py"):
            launched = re.findall(r"^ +(_\w+)\[[^\]]*\]\(", path.read_text(), re.MULTILINE)
            found[path.parent.name] = set(map(class_of, launched))
            names += launched
        assert found == CLASSES
        # a profile adds up kernels of one name
        assert len(names) == len(set(names)) > 15

    @pytest.mark.parametrize(
        ("kernel", "name"),
        [
            ("nvjet_sm90_qqtst_128x128_128x6_2x1_v_bz_ovscale_TNT", "float8 product"),
            ("nvjet_sm90_tst_160x256_64x4_1x2_h_bz_coopA_TNN", "matrix product"),
            ("void cudnn::fusion::compute_dot_do_o<true>(void const*)", "attention"),
            # a template's `false` is no log-sum-exp, and a norm of gradients no norm of the model
            ("void cub::scan::DeviceScanKernel<long, false>(long)", "elementwise and other"),
            ("void at::native::reduce_kernel<NormTwoOps<float>>", "elementwise and other"),
        ],
    )
    def test_a_kernel_of_others_is_counted_by_what_it_does(self, class_of, kernel, name):
        assert class_of(kernel) == name

    def test_the_picture_has_every_class_of_a_pass(self):
        plots = load_module(BENCHMARKS / "step_plots.py")
        for profile in plots.PROFILES:
            own = plots.classes(profile)
            rows = read(BENCHMARKS / f"results/2026-11-26-h200/step-profile-{profile}.csv")
            assert sum(own.values()) == pytest.approx(sum(float(r["total_us"]) for r in rows) / 1e3)
            assert own["elementwise and other"] < 0.005 * sum(own.values())
