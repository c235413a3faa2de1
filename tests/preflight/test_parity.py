"""The engine against plain data parallelism on the ranks at hand."""

import math
from dataclasses import astuple, replace
from pathlib import Path

import pytest

from pretrain.compose import load
from pretrain.engine.config import EngineConfig, Precision
from pretrain.model.cost import count_parameters
from pretrain.preflight.findings import Status
from pretrain.preflight.parity import (
    LIMITS,
    Distance,
    Steps,
    alternatives,
    distance,
    small_config,
)
from pretrain.testing import load_module, run_ranks

RANKS = load_module(Path(__file__).with_name("job_ranks.py"))
CASES = [
    ["engine=zero1", "engine.device=cpu"],
    ["engine=zero2-bf16", "engine.overlap_comm=true", "engine.device=cpu"],
    ["engine=zero3-bf16", "engine.checkpoint_activations=true", "engine.device=cpu"],
    ["engine=zero1-bf16", "optimizer=adamw", "engine.device=cpu"],
]


def test_the_engine_computes_right_on_two_ranks_and_both_say_the_same() -> None:
    first, second = run_ranks(RANKS.parity, 2, CASES)
    verdicts = [
        [(finding.status, finding.subject) for finding in found] for found in (first, second)
    ]
    assert verdicts == [[(Status.ok, "parity")] * len(CASES)] * 2
    assert "ZeRO-2 bf16, overlap_comm on 2 ranks" in first[1].detail
    # the model has learned something, so that lost updates would have shown
    for finding in first:
        before, after = finding.detail.split("loss ")[1].split(",")[0].split(" -> ")
        assert float(after) < float(before) - 0.02


@pytest.mark.parametrize("experiment", ["huginn-3.5b", "huginn-100m"])
def test_the_probe_fills_several_buckets_in_a_backward_pass(experiment: str) -> None:
    """With a single one, which leaves at its end, nothing would overlap."""
    config = load("train", [f"experiment={experiment}", "engine=zero2-bf16"])
    small = small_config(config, ranks=2)
    counts = count_parameters(small.model)
    assert sum(counts.values()) > 4 * small.engine.bucket_elements
    assert counts["embedding"] > small.engine.bucket_elements
    one = replace(config, engine=replace(config.engine, bucket_elements=1))
    assert small_config(one, ranks=2).engine.bucket_elements == 1


@pytest.mark.parametrize(
    ("overrides", "switch", "value", "named", "remedy"),
    [
        (
            ["engine=zero3-bf16", "engine.overlap_comm=true"],
            "overlap_comm",
            True,
            "engine.overlap_comm=true under ZeRO-3 bf16, overlap_comm computes wrong here",
            "use engine.overlap_comm=false: it agrees",
        ),
        (
            ["engine=zero3-bf16", "engine.overlap_comm=true"],
            "zero_stage",
            3,
            "engine.zero_stage=3 under ZeRO-3 bf16, overlap_comm computes wrong here",
            "use engine.zero_stage=1 engine.overlap_comm=false: it agrees",
        ),
        (
            ["engine=zero1"],
            "zero_stage",
            1,
            "ZeRO-1 fp32 computes wrong here",
            "do not train here: no other setting agrees either",
        ),
    ],
)
def test_a_gradient_that_is_one_percent_off_on_one_rank_is_refused_by_name(
    overrides, switch, value, named, remedy
) -> None:
    arguments = ([*overrides, "engine.device=cpu"], switch, value)
    (finding,), other = run_ranks(RANKS.wrong_parity, 2, *arguments)
    assert finding.status is Status.missing
    assert finding.detail.startswith(named)
    assert finding.remedy == remedy
    assert other[0].status is Status.missing


def test_what_is_no_number_is_never_within_limits() -> None:
    right = Steps([3.0, 2.0, 1.0], [1.0, 1.0, 1.0])
    assert not distance(right, right).exceeds(LIMITS[Precision.fp32])
    for wrong in (math.nan, math.inf):
        for losses, norms in (([3.0, wrong, 1.0], right.norms), (right.losses, [wrong, 1.0, 1.0])):
            assert distance(Steps(losses, norms), right).exceeds(LIMITS[Precision.bf16])
            assert distance(right, Steps(losses, norms)).exceeds(LIMITS[Precision.bf16])


def test_distances_are_relative_and_the_largest() -> None:
    expected = Steps([4.0, 2.0, 1.0], [1.0, 2.0, 4.0])
    got = Steps([4.0, 2.1, 1.02], [1.01, 2.0, 4.0])
    apart = distance(got, expected)
    assert astuple(apart) == pytest.approx(astuple(Distance(first_norm=0.01, loss=0.05, norm=0.01)))


def test_what_keeps_iterations_is_left_out_with_recomputation() -> None:
    engine = EngineConfig(
        zero_stage=1, precision=Precision.bf16, checkpoint_activations=True, kept_iterations=2
    )
    ((name, change),) = alternatives(engine)
    assert name == "engine.checkpoint_activations=true"
    assert not replace(engine, **change).checkpoint_activations
    ((_, change),) = alternatives(replace(engine, kept_iterations=0))
    assert change == {"checkpoint_activations": False}


def test_nothing_can_be_left_out_of_the_plainest_engine() -> None:
    assert alternatives(EngineConfig(zero_stage=1, precision=Precision.fp32)) == []
