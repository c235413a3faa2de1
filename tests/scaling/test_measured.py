"""The model beside measured steps: what was fitted, what was predicted, and what is refused."""

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from pretrain.compose import load
from pretrain.errors import DataError
from pretrain.scaling.compute import DEEPSPEED, optimizer_s
from pretrain.scaling.estimate import step_seconds
from pretrain.scaling.measured import (
    Steps,
    compare,
    fitted,
    fitted_to_passes,
    read_passes,
    read_scaled,
    read_steps,
)
from pretrain.scaling.what_if import what_if
from pretrain.testing import load_module

RESULTS = Path(__file__).parents[2] / "kernels/benchmarks/results"
ONE_GPU = ["experiment=huginn-3.5b", "cluster.gpus_per_node=1", "batch.global_tokens=32768"]
KEPT = RESULTS / "2026-11-22-h200/huginn-3.5b.jsonl"
RECOMPUTED = RESULTS / "2026-11-22-h200/huginn-3.5b-checkpointed.jsonl"


def one_gpu(*overrides):
    return load("train", [*ONE_GPU, *overrides])


def plain(*overrides):
    """A run of the plain path on one GPU, at the rates of the first record."""
    start = one_gpu("model.path=reference")
    found = fitted(start, read_steps(KEPT, start), DEEPSPEED).cluster
    rates = {
        "cluster.utilization": found.utilization,
        "cluster.hardware.forward_utilization": found.hardware.forward_utilization,
    }
    return what_if(one_gpu("model.path=reference", *overrides), rates)


def test_shipped_rates_are_those_of_the_fused_paths_passes():
    config = one_gpu()
    passes = read_passes(RESULTS / "step.csv", config, gpu="NVIDIA H200")
    assert len(set(zip(passes.no_grad, passes.with_grad, strict=True))) >= 4
    found = fitted_to_passes(config, passes).cluster
    # they are written with three digits
    assert config.cluster.utilization == pytest.approx(found.utilization, abs=5e-4)
    shipped = config.cluster.hardware.forward_utilization
    assert shipped == pytest.approx(found.hardware.forward_utilization, abs=5e-4)


def test_recomputed_steps_are_predicted_from_steps_that_kept_activations():
    config = plain("engine.checkpoint_activations=true")
    found = compare(config, read_steps(RECOMPUTED, config), DEEPSPEED)
    assert len(found.measured) == 9
    assert np.abs(found.errors).max() < 0.015
    assert found.explained > 0.99
    assert abs(found.bias) < 0.005


def test_the_small_presets_rates_give_its_level():
    config = load("train", ["experiment=huginn-100m", "batch.global_tokens=65536"])
    steps = read_steps(RESULTS / "2026-11-22-h200/huginn-100m.jsonl", config)
    found = compare(config, steps, DEEPSPEED)
    assert len(found.measured) == 149
    assert abs(found.bias) < 0.01


def test_a_fit_recovers_rates_that_made_the_steps():
    config = one_gpu("cluster.utilization=0.5", "cluster.hardware.forward_utilization=0.7")
    totals = read_steps(KEPT, config).totals
    made = Steps(totals, step_seconds(config, totals))
    start = one_gpu()
    found = fitted(start, made).cluster
    assert found.utilization == pytest.approx(0.5)
    assert found.hardware.forward_utilization == pytest.approx(0.7)
    comparison = compare(config, made)
    assert comparison.explained == pytest.approx(1)
    assert comparison.bias == pytest.approx(0)


def test_passes_of_what_was_not_measured_are_refused():
    with pytest.raises(DataError, match=r"no row with .*NVIDIA A100"):
        read_passes(RESULTS / "step.csv", one_gpu(), gpu="NVIDIA A100")


@pytest.fixture(scope="module")
def engine_runs():
    """Rows of engine.csv, each with the seconds that are predicted: a quarter of a minute."""
    return load_module(RESULTS.parent / "scaling.py").engine_runs()


def test_whole_steps_are_predicted_from_bare_passes_to_about_a_per_cent(engine_runs):
    """Rows of engine.csv on one, two and four GPUs, by DeepSpeed's update and by ours.

    share_of_bare says what passes alone would have taken, with nobody waiting, by three fitted
    numbers.
    """
    assert {row["accumulation"] for row, _ in engine_runs} == {"1", "4", "8"}
    several = set(itertools.product("24", "123"))
    assert {(row["gpus"], row["zero"]) for row, _ in engine_runs} == {("1", "1")} | several
    for row, predicted_s in engine_runs:
        seconds = float(row["seconds"])
        # DeepSpeed's own stage 3; and one card that is 2 % slower than the others
        is_apart = row["zero"] == "3" or row["cards"] == "3bbb500d"
        assert predicted_s == pytest.approx(seconds, rel=0.037 if is_apart else 0.014), row
        # the depths are the run's own: passes are the same share of both, within the prediction
        assert float(row["share_of_bare"]) * seconds < predicted_s


def test_an_update_of_today_does_not_explain_a_record_of_another(engine_runs):
    """3,715 tokens/s at one micro-step: DeepSpeed's bytes would be 3 % too slow."""
    [(row, predicted_s)] = [
        (row, predicted_s)
        for row, predicted_s in engine_runs
        if row["commit"] == "7934327" and row["accumulation"] == "1"
    ]
    config = one_gpu("batch.global_tokens=4096")
    slower_s = int(row["steps"]) * (optimizer_s(config, DEEPSPEED) - optimizer_s(config))
    error, other = (s / float(row["seconds"]) - 1 for s in (predicted_s, predicted_s + slower_s))
    assert -0.01 < error < 0
    assert other > 0.02


def test_a_fit_tells_recomputed_iterations_from_kept_ones():
    """Made with 3 of 8 kept; a fit that counted 8 or none again would find other rates."""
    overrides = ["engine.checkpoint_activations=true", "engine.kept_iterations=3"]
    config = one_gpu(*overrides)
    totals = read_steps(KEPT, one_gpu()).totals
    found = fitted(config, Steps(totals, step_seconds(config, totals))).cluster
    assert found.utilization == pytest.approx(config.cluster.utilization)
    other = one_gpu(overrides[0])
    assert (step_seconds(other, totals) > step_seconds(config, totals)).all()


def test_depths_of_another_run_are_refused(tmp_path):
    config = one_gpu("run.seed=1")
    with pytest.raises(DataError, match=r"step 2 has mean depth 44.875, this configuration gives"):
        read_steps(KEPT, config)


def test_rates_that_cannot_be_told_apart_are_refused():
    config = one_gpu()
    steps = read_steps(KEPT, config)
    # as if deeper steps took less time
    backwards = Steps(steps.totals, 20 - steps.seconds / 2)
    with pytest.raises(DataError, match="whose depths differ more"):
        fitted(config, backwards)
    with pytest.raises(DataError, match="not 8 GPUs'"):
        fitted(load("train", ["experiment=huginn-3.5b", "batch.global_tokens=32768"]), steps)


def write_rows(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "what", "value", "unit", "gpus", "gpu", "torch", "commit"])
        writer.writerows([["zero", *row, "a card", "2.11", "abc"] for row in rows])


def test_speed_of_several_gpus_is_predicted_from_one_and_read_beside(tmp_path):
    path = tmp_path / "reliability.csv"
    write_rows(
        path,
        [
            ["ZeRO-1, one GPU", 1000, "tokens/s", 1],
            ["ZeRO-1", 1900, "tokens/s", 2],
            ["ZeRO-1, of 2 x one GPU", 0.95, "", 2],
            ["ZeRO-2", 1700, "tokens/s", 2],
            ["ZeRO-3, peak of a GPU", 5, "bytes", 2],
        ],
    )
    found = read_scaled(path, one_gpu(), steps=range(2, 5))
    assert [(row.gpus, row.zero_stage, row.gpu) for row in found] == [
        (2, 1, "a card"), (2, 2, "a card")]  # fmt: skip
    assert [row.measured for row in found] == [0.95, 0.85]
    first, second = (row.predicted for row in found)
    assert 0.5 < second < first < 1
    # a card that computes at half the speed exchanges for a smaller share of its time
    rows = [["ZeRO-1, one GPU", 500, "tokens/s", 1], ["ZeRO-1", 900, "tokens/s", 2]]
    write_rows(path, rows)
    assert read_scaled(path, one_gpu(), steps=range(2, 5))[0].predicted > first


def test_two_gpus_are_predicted_from_one_within_a_per_cent():
    """Measured 0.877, 0.857 and 0.856, with recomputed activations, over steps 2 to 4."""
    config = plain("engine.checkpoint_activations=true")
    path = RESULTS / "reliability.csv"
    found = read_scaled(path, config, steps=range(2, 5), moved=DEEPSPEED)
    assert {row.zero_stage for row in found} == {1, 2, 3}
    for row in found:
        assert row.predicted == pytest.approx(row.measured, abs=0.01)


def test_several_gpus_without_one_are_refused(tmp_path):
    path = tmp_path / "reliability.csv"
    write_rows(path, [["ZeRO-1", 1900, "tokens/s", 2]])
    with pytest.raises(DataError, match="no row 'ZeRO-1, one GPU' for a card"):
        read_scaled(path, one_gpu(), steps=range(2, 5))


def test_a_file_without_such_rows_gives_none(tmp_path):
    path = tmp_path / "reliability.csv"
    write_rows(path, [])
    assert read_scaled(path, one_gpu(), steps=range(2, 5)) == []


def test_records_without_times_are_passed_over(tmp_path):
    """A validation is a record too; the first step warms up."""
    lines = KEPT.read_text().splitlines()
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*lines[:3], json.dumps({"validation/step": 3}), *lines[3:]]))
    config = one_gpu()
    assert len(read_steps(path, config).seconds) == len(lines) - 1
