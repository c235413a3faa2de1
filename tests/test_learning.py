"""The runs that show whether depth helps: what they share, what they differ in, what is kept."""

import csv
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import SMALL
from pretrain.compose import load
from pretrain.model.cost import TokenFlops, count_parameters, mean_iterations
from pretrain.testing import load_module

BENCHMARKS = Path(__file__).parent.parent / "kernels/benchmarks"


@pytest.fixture(scope="module")
def benchmarks():
    """Modules of the benchmarks by name, which import each other as their programs do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield lambda name: load_module(BENCHMARKS / f"{name}.py")


@pytest.fixture(scope="module")
def configs(benchmarks):
    """The configuration of every run at a million tokens."""
    table = benchmarks("learning_runs")
    told = {
        name: table.overrides_of(run, tokens=1_000_000, words=[])
        for name, run in table.all_runs([]).items()
    }
    return {name: load("train", words) for name, words in told.items()}


def parameters(config):
    return sum(count_parameters(config.model).values())


def flops(config):
    return TokenFlops.of(config.model).model(*mean_iterations(config.depth, rows=1))


def test_the_fixed_models_have_what_the_recurrent_one_has(configs):
    recurrent = configs["recurrent"]
    same_size, same_cost = configs["fixed-equal-parameters"], configs["fixed-equal-flops"]
    assert parameters(same_size) == parameters(recurrent)
    assert flops(same_size) < flops(recurrent) / 5
    one_layer_more = dataclasses.replace(
        same_cost, model=dataclasses.replace(same_cost.model, core_layers=46)
    )
    layer = flops(one_layer_more) - flops(same_cost)
    assert abs(flops(same_cost) - flops(recurrent)) <= layer / 2
    assert [c.depth.mean for c in (recurrent, same_size, same_cost)] == [16, 1, 1]


def test_runs_of_a_group_differ_in_what_their_names_say(configs):
    def differing(one, other):
        pairs = zip(flat(one).items(), flat(other).items(), strict=True)
        return {key for (key, a), (_, b) in pairs if a != b}

    def flat(config):
        found = dataclasses.asdict(config)
        return {f"{area}.{key}": value for area, own in found.items() for key, value in own.items()}

    dealt = configs["rows-dealt-0"]
    assert differing(dealt, configs["rows-dealt-1"]) == {"run.seed"}
    assert differing(dealt, configs["rows-independent-0"]) == {"depth.sampling"}
    assert differing(dealt, configs["one-depth-a-step-0"]) == {"depth.scope"}
    rates = {configs[f"rate-{rate}"].optimizer.learning_rate for rate in ("4e-4", "8e-4", "1.6e-3")}
    assert rates == {4e-4, 8e-4, 1.6e-3}
    # samples of text are written at depth 4 and at the mean one
    assert differing(configs["recurrent"], configs["fixed-equal-parameters"]) == {
        "depth.law", "depth.mean", "depth.backprop", "validation.sample_depths",
    }  # fmt: skip
    schedules = {dataclasses.astuple(c.schedule)[:2] for c in configs.values()}
    assert schedules == {(100_000, 400_000)}


def test_words_change_all_runs_but_not_what_one_is_about(benchmarks):
    table = benchmarks("learning_runs")
    words = ["depth.mean=4", "model.width=192", "model.heads=2", "optimizer.learning_rate=1e-3"]
    runs = table.all_runs(words)

    def config(name):
        return load("train", table.overrides_of(runs[name], tokens=1_000_000, words=words))

    assert {config(name).model.width for name in runs} == {192}
    assert [config(n).depth.mean for n in ("recurrent", "fixed-equal-parameters")] == [4, 1]
    assert config("rate-4e-4").optimizer.learning_rate == 4e-4


def test_an_unknown_run_is_named(benchmarks):
    table = benchmarks("learning_runs")
    runs = table.all_runs([])
    assert table.named("main,rate-4e-4,recurrent", runs) == [*table.GROUPS["main"], "rate-4e-4"]
    with pytest.raises(SystemExit, match="runs=recurent is unknown; there are main, sampling"):
        table.named("recurent", runs)


def test_a_run_that_is_measured_again_replaces_its_rows_alone(benchmarks, tmp_path):
    results = benchmarks("learning_results")
    path = tmp_path / "table.csv"
    results.merge(path, [{"run": "a", "loss": 1}, {"run": "b", "loss": 2}, {"run": "b", "loss": 3}])
    results.merge(path, [{"run": "b", "loss": 4}])
    with path.open() as file:
        assert [*csv.DictReader(file)] == [{"run": "a", "loss": "1"}, {"run": "b", "loss": "4"}]


def test_the_noise_of_gradients_is_their_variance_about_the_true_mean(benchmarks):
    noise = benchmarks("depth_noise")
    # of two draws: |a - b|^2 / 2, and a . b is what both have in common
    found = noise.spread([torch.tensor([1.0, 3.0]), torch.tensor([4.0, 2.0])])
    assert float(found["noise"]) == pytest.approx((9 + 1) / 2)
    assert float(found["gradient_square"]) == pytest.approx(4 + 6)
    generator = torch.Generator().manual_seed(0)
    draws = [2.0 + torch.randn(10_000, generator=generator) for _ in range(8)]
    found = noise.spread(draws)
    # 10,000 coordinates with variance 1 and mean 2; deviations: 1.4 / sqrt(7 x 10,000) of the
    # noise, 2 x 2 / sqrt(8 x 10,000) a coordinate of the square; five are allowed
    assert float(found["noise"]) == pytest.approx(10_000, rel=0.027)
    assert float(found["gradient_square"]) == pytest.approx(40_000, rel=0.018)
    assert float(found["standard_error"]) < 200


@pytest.mark.slow
def test_runs_are_trained_measured_resumed_and_drawn(workspace, tmp_path):
    words = [word for word in SMALL if not word.startswith(("run.", "schedule.", "checkpoint."))]
    command = [
        sys.executable, BENCHMARKS / "learning.py", *words, "engine=zero1", "cluster=local",
        "runs=recurrent,fixed-equal-parameters,rows-independent-0", "model.core_layers=1",
        "data.shards=out/data/small-tiny", "tokenizer.path=out/tokenizer/small-384", "seconds=500",
        "tokens=3072", "rows=8", "draws=3", f"folder={tmp_path}/runs", f"results={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    def table(name):
        with (tmp_path / f"{name}.csv").open() as file:
            return [*csv.DictReader(file)]

    assert [(row["run"], row["steps"]) for row in table("learning")] == [
        ("recurrent", "6"), ("fixed-equal-parameters", "6"), ("rows-independent-0", "6"),
    ]  # fmt: skip
    losses = [float(row["loss"]) for row in table("learning-losses") if row["run"] == "recurrent"]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    final = [row for row in table("learning-depths") if row["tokens"] == "3072"]
    assert {row["depth"] for row in final} == {"1", "2", "4", "8", "16", "32", "64"}
    noise = table("learning-noise")
    assert len(noise) == 6
    assert all(float(row["noise"]) > 0 for row in noise)
    first = (tmp_path / "learning-losses.csv").read_bytes()
    again = subprocess.run(command, cwd=workspace, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (tmp_path / "learning-losses.csv").read_bytes() == first
    drawn = subprocess.run(
        [sys.executable, BENCHMARKS / "learning_plots.py", f"results={tmp_path}",
         f"images={tmp_path}"],
        env=os.environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    pictures = [Path(line) for line in drawn.stdout.splitlines()]
    assert [path.name for path in pictures] == [
        "learning-tokens.png", "learning-depths.png", "learning-sampling.png",
    ]  # fmt: skip
    assert all(path.stat().st_size > 10_000 for path in pictures)
