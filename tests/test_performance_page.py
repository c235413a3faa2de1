"""docs/performance.md and README.md say what the tables of measurements have."""

import csv
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from pretrain.testing import load_module

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "kernels/benchmarks"
RESULTS = BENCHMARKS / "results"
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
COMMIT = "f952caa"
# of the passes of one GPU, and what the page calls their paths
PASSES = "79e5bf6"
PATHS = {
    "plain modules": ("reference", "bf16"), "torch.compile": ("compiled", "bf16"),
    "fused, bf16": ("fused", "bf16"), "fused, float8 without gradient": ("fused", "fp8-prefix"),
    "fused, float8 everywhere": ("fused", "fp8"),
}  # fmt: skip
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


def table_behind(words: str) -> list[list[str]]:
    """The cells of the first table behind some words of the page, without its head."""
    section = PAGE[PAGE.index(words) :]
    table = section[section.index("\n|---") :].strip().split("\n\n")[0].splitlines()[1:]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in table]


def rows_of(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def lines() -> list[Line]:
    cells = table_behind("### Several H200s")
    return [Line(setting, *map(numbers, rest)) for setting, *rest in cells]


@pytest.fixture(scope="module")
def measured() -> list[dict[str, str]]:
    rows = rows_of("engine.csv")
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


def passes(path: tuple[str, str], rows: str = "1") -> dict[tuple[int, int], dict[str, str]]:
    """Of the large model at one number of rows, by iterations without and with gradient."""
    wanted = (PASSES, "huginn-3.5b", rows, "0", *path)
    names = ("commit", "preset", "rows", "zero", "path", "precision")
    return {
        (int(row["no_grad"]), int(row["with_grad"])): row
        for row in rows_of("step.csv")
        if tuple(row[name] for name in names) == wanted
    }


def test_speeds_of_paths_are_those_of_make_bench() -> None:
    for path, (_, _, speeds, flops, _, peaks) in zip(
        PATHS.values(), table_behind("| path | rows | tokens/s | model"), strict=True
    ):
        # rows three and four are of other runs
        for number in range(2):
            row = passes(path, str(number + 1))[24, 8]
            assert numbers(speeds)[number] == pytest.approx(
                float(row["tokens_per_s_per_gpu"]), abs=0.51
            )
            assert numbers(peaks)[number] == pytest.approx(int(row["peak_bytes"]) / 1e9, abs=0.51)
        first = numbers(flops)[0]
        assert first == pytest.approx(float(passes(path)[24, 8]["model_tflops_per_s"]), abs=0.51)


def test_what_an_iteration_costs_is_fitted_to_make_bench() -> None:
    fit_of = load_module(BENCHMARKS / "pass_times.py").Fit.of
    table = table_behind("### What an iteration costs")
    assert [name for name, *_ in table] == list(PATHS)
    for name, *cells in table:
        rates = {
            n_k: float(row["tokens_per_s_per_gpu"]) for n_k, row in passes(PATHS[name]).items()
        }
        fit = fit_of({n_k: 4096 / rate for n_k, rate in rates.items()})
        wanted = [*(1e3 * fit.terms), 100 * fit.residual]
        found = [numbers(cell)[0] for cell in cells]
        assert found == pytest.approx(wanted, abs=0.051)


def test_each_millisecond_is_held_against_its_limit() -> None:
    """Bytes of the ops as kernels/README.md has them; D, I and V of the model at T tokens."""
    t, d, i, v = 4096, 5280, 17_920, 65_536
    attention = 2 * d * (t + 1) * t
    # passes of layers forward, and with gradient: 2 + 4 x 32 + 2, and 2 + 4 x 8 + 2
    layers, graded = 132, 36
    work = {
        "attention, forward": layers * attention / 1e12,
        "attention, backward": graded * 2.5 * attention / 1e12,
        "rotation and SwiGLU, forward": layers * t * (6 * i + 8 * d) / 1e9,
        "rotation and SwiGLU, backward": graded * t * (12 * i + 12 * d) / 1e9,
        # 4 D where a layer of prelude or coda begins, and for the two last norms
        "norm chain, forward": ((2 * layers + 32) * 8 + 6 * 4) * t * d / 1e9,
        # 6 D where no residual stream comes back
        "norm chain, backward": ((2 * graded + 8 + 4 - 12) * 8 + (12 + 2) * 6) * t * d / 1e9,
        "cross-entropy": 6 * v * t / 1e9,
    }
    names = {
        "matrix products": r"nvjet", "attention, forward": r"fprop",
        "attention, backward": r"bprop|cudnn::fusion", "rotation and SwiGLU, forward": "_forward",
        "rotation and SwiGLU, backward": "_backward", "norm chain, forward": "_chain_row",
        "norm chain, backward": "_walk_backward", "cross-entropy": "_nats|_gradient",
    }  # fmt: skip
    profile = rows_of("2026-11-26-h200/step-profile-fused-1.csv")
    *parts, others, whole = table_behind("its kernels against what they cannot beat")
    left = sum(float(row["total_us"]) for row in profile) / 1e3
    assert numbers(whole[2])[0] == pytest.approx(left, abs=0.051)
    for name, launches, ms, done, rate, share in parts:
        kernels = [row for row in profile if re.match(f".*({names[name]})", row["kernel"])]
        if name.startswith("rotation"):
            kernels = [row for row in kernels if row["kernel"] == names[name]]
        assert int(launches) == sum(int(row["calls"]) for row in kernels)
        measured_ms = sum(float(row["total_us"]) for row in kernels) / 1e3
        left -= measured_ms
        assert float(ms) == pytest.approx(measured_ms, abs=0.051)
        amount = work.get(name, numbers(done)[0])
        assert numbers(done)[0] == pytest.approx(amount, abs=0.051)
        per_ms = amount / measured_ms * (1e3 if "FLOP" in rate else 1)
        assert numbers(rate)[0] == pytest.approx(per_ms, rel=0.003)
        limit = 682 if "FLOP" in rate else 4.25
        assert float(share) == pytest.approx(per_ms / limit, abs=0.006)
    assert numbers(others[2])[0] == pytest.approx(left, abs=0.051)


def test_float8_at_fixed_weights_is_no_worse_than_the_page_says() -> None:
    tables = {
        "no_grad_precision=fp8": (
            "h200/step-float8-same",
            "make-bench/step-float8-huginn-3.5b-same",
        ),
        "grad_precision=fp8": ("h200/step-float8-fp8", "make-bench/step-float8-huginn-3.5b-fp8"),
    }
    for cell, cosines, loss in table_behind("At fixed initial weights of the 3.5 B model"):
        name = cell.split("`")[1]
        rows = [row for file in tables[name] for row in rows_of(f"2026-11-26-{file}.csv")]
        mean, least = numbers(cosines)
        assert mean == pytest.approx(min(float(row["cosine_mean"]) for row in rows), abs=6e-6)
        assert least == pytest.approx(min(float(row["cosine_min"]) for row in rows), abs=6e-6)
        said = re.search(r"at most ([\d.]+e-\d)", loss)
        assert said
        worst = max(abs(float(row["loss_difference"])) for row in rows)
        assert worst <= float(said[1]) <= 1.1 * worst


def largest_window(one: str, other: str) -> float:
    """Of the differences of two runs' losses, means of 50 steps."""
    losses = rows_of("2026-11-26-h200/convergence-losses.csv")
    differences = [float(row[one]) - float(row[other]) for row in losses]
    windows = [sum(differences[first : first + 50]) / 50 for first in range(0, 500, 50)]
    return max(map(abs, windows))


def test_float8_is_as_near_to_bf16_in_training_as_the_page_says() -> None:
    words = " ".join(PAGE.split())
    said = re.search(
        r"without gradient stays within ([\d.]+) nats .* within ([\d.]+) on seed 0", words
    )
    again = re.search(r"Reruns of fused bf16 stay within ([\d.]+) of each other", words)
    assert said
    assert again
    prefix, everywhere = "fused, fp8 without gradient, seed", "fused, fp8 everywhere, seed 0"
    for number, worst in (
        (said[1], max(largest_window(f"{prefix} {s}", f"fused, seed {s}") for s in (0, 1))),
        (said[2], largest_window(everywhere, "fused, seed 0")),
        (again[1], largest_window("fused again, seed 0", "fused, seed 0")),
    ):
        assert worst <= float(number) < worst + 0.001


def test_the_first_page_says_the_speed_of_float8_everywhere() -> None:
    """The others, which its picture shows, test_benchmarks.py compares."""
    rate = float(passes(PATHS["fused, float8 everywhere"])[24, 8]["tokens_per_s_per_gpu"])
    said = f"{round(rate, -1):,.0f} with float8 everywhere"
    assert said in (ROOT / "README.md").read_text(encoding="utf-8")
