"""A run's wall time: its parts add up, vanish where they must, and grow with their causes."""

import numpy as np
import pytest

from pretrain.compose import load
from pretrain.engine.config import Precision
from pretrain.errors import ConfigError
from pretrain.model.balance import Layout, simulate
from pretrain.model.config import Sampling, Scope
from pretrain.scaling.compute import (
    RowSeconds,
    mean_row_iterations,
    optimizer_s,
    validation_s,
)
from pretrain.scaling.estimate import estimate, slowest_s, step_seconds, step_time
from pretrain.scaling.what_if import what_if

# 512 rows a step
BASE = load("train", ["experiment=huginn-3.5b", "batch.global_tokens=2097152"])
EIGHT_HOSTS = {"cluster.nodes": 8}
UNDEALT = {"depth.sampling": Sampling.independent}
LOCKSTEP = {"depth.scope": Scope.step}
RECOMPUTED = {"engine.checkpoint_activations": True}


def config_of(*changes):
    return what_if(BASE, {name: value for change in changes for name, value in change.items()})


def simulated(config, steps=20):
    return simulate(config.depth, seed=0, rows=config.rows_per_step, steps=steps)


def estimate_of(*changes):
    config = config_of(*changes)
    return estimate(config, simulated(config))


@pytest.mark.parametrize("scope", [Scope.row, Scope.step])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("nodes", [1, 8])
def test_shares_of_wall_time_add_up(nodes, stage, scope):
    found = estimate_of({"cluster.nodes": nodes, "engine.zero_stage": stage, "depth.scope": scope})
    assert sum(found.wall.values()) == pytest.approx(1)
    assert min(found.wall.values()) >= 0
    assert found.goodput == pytest.approx(sum(list(found.wall.values())[:5]))
    seconds = found.hours * 3600 * found.goodput / found.total_steps
    assert seconds == pytest.approx(found.step.total_s)
    assert found.tokens_per_s == pytest.approx(2_097_152 / found.step.total_s)


def test_one_rank_waits_for_nobody():
    step = estimate_of({"cluster.gpus_per_node": 1}).step
    assert step.depth_wait_s == step.straggler_s == step.communication_s == 0
    assert step.idle == pytest.approx(0)


def test_overlap_lets_stage_2_wait_less_often():
    """Four ranks with eight rows each: a share of what stage 2 waits for more than stage 1."""

    def waited(stage, overlaps=True, precision=Precision.bf16, **hardware):
        config = config_of(
            {"cluster.gpus_per_node": 4, "batch.global_tokens": 131_072, "engine.zero_stage": stage,
             "engine.overlap_comm": overlaps, "engine.precision": precision},
            {f"cluster.hardware.{name}": value for name, value in hardware.items()},
        )  # fmt: skip
        totals = simulated(config).totals
        seconds = RowSeconds.of(config).of_depths(totals, config.depth.backprop)
        return slowest_s(config, seconds)

    once, often = waited(1), waited(2, overlaps=False)
    assert (once < often).all()
    assert waited(2, overlap_share=0.4) == pytest.approx(0.4 * once + 0.6 * often)
    assert waited(2, overlap_share=0) == pytest.approx(often)
    # DeepSpeed's own reduction ends with the backward pass
    assert waited(2, precision=Precision.fp32) == pytest.approx(often)
    # stage 3 gathers weights in the forward pass, which nothing hides
    assert waited(3) == pytest.approx(often)
    assert waited(3, overlaps=False) == pytest.approx(often)


def test_equal_gpus_in_lockstep_wait_only_for_bytes():
    step = estimate_of(EIGHT_HOSTS, LOCKSTEP, {"cluster.hardware.gpu_spread": 0.0}).step
    assert step.depth_wait_s == step.straggler_s == 0
    assert step.idle == pytest.approx(step.communication_s / step.total_s)


def test_without_failures_goodput_lacks_saves_and_validations_only():
    found = estimate_of(EIGHT_HOSTS, {"cluster.hardware.failures_per_gpu_hour": 0.0})
    lost = found.wall["saves"] + found.wall["validation"]
    assert found.goodput == pytest.approx(1 - lost)
    assert found.wall["lost work"] == found.wall["recovery"] == 0


def test_work_is_the_laws_whatever_was_simulated():
    """The mean of 512 rows drawn in two steps would be 3 % off."""
    config = config_of(EIGHT_HOSTS, UNDEALT)
    few = step_time(config, simulated(config, steps=2))
    many = step_time(config, simulated(config, steps=30))
    assert few.compute_s == many.compute_s
    iterations = mean_row_iterations(config, config.depth)
    assert iterations[2] == 0
    assert few.compute_s == pytest.approx(8 * RowSeconds.of(config).at(*iterations))


def test_an_update_is_that_of_the_stage_and_sums_grow_with_micro_steps():
    """DeepSpeed's: 57.5 ms measured for 3.565 billion parameters, 18 bytes more for each and
    micro-step; ours moves 42 a step, and under ZeRO-1 6 and then 10 for sums."""
    byte_s = 3_564_976_800 / 4.27e12

    def seconds(stage, rows, precision=Precision.bf16):
        alone = {"cluster.gpus_per_node": 1, "batch.global_tokens": 4096 * rows}
        engine = {"engine.zero_stage": stage, "engine.precision": precision}
        return optimizer_s(config_of(alone, engine))

    assert seconds(3, 512) - 512 * 18 * byte_s == pytest.approx(57.5e-3, rel=0.005)
    assert seconds(1, 1) == pytest.approx((42 + 6) * byte_s)
    assert seconds(1, 512) - seconds(1, 511) == pytest.approx(10 * byte_s)
    # under ZeRO-2 each gradient is widened whole, and what a rank keeps of it added
    assert seconds(2, 3) == pytest.approx((42 + 4 + 3 * (6 + 12)) * byte_s)
    assert seconds(2, 2) - seconds(2, 1) == pytest.approx(18 * byte_s)
    # nothing is widened in fp32, and DeepSpeed's step stays
    assert seconds(1, 3, Precision.fp32) == pytest.approx((69 + 3 * 12) * byte_s)


def test_wait_by_depth_is_the_simulated_wait_of_the_core():
    """With recomputation and one rate an iteration with gradient costs 4, so the simulation of
    model/balance counts in the same units; prelude, coda and head take their share off."""
    for stage in (1, 2):
        config = config_of(
            EIGHT_HOSTS,
            RECOMPUTED,
            {"cluster.utilization": 0.6, "cluster.hardware.forward_utilization": 0.6},
            {"engine.zero_stage": stage, "engine.overlap_comm": False},
        )
        simulation = simulated(config)
        wait = simulation.wait(Layout(ranks=64, micro_rows=1, zero_stage=stage)).slowest
        row, step = RowSeconds.of(config), step_time(config, simulation)
        mean = row.at(*mean_row_iterations(config, config.depth))
        core = 1 - row.once_s / mean
        # the stratified mean of a step is within 0.3 % of the law's
        assert step.depth_wait_s / step.compute_s == pytest.approx((wait - 1) * core, rel=5e-3)
        assert wait > 1.001


def test_the_designs_table_of_waits_in_seconds():
    """512 rows on 64 ranks, undealt: 1.32 times the core's work (0.93 of the step's)."""
    config = config_of(EIGHT_HOSTS, UNDEALT, RECOMPUTED)
    step = step_time(config, simulated(config, steps=60))
    assert 1 + step.depth_wait_s / step.compute_s / 0.93 == pytest.approx(1.32, abs=0.03)


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("cluster.hardware.gpu_spread", 0.03, "stragglers"),
        ("cluster.hardware.network_bytes_per_s", 1e10, "communication"),
        ("cluster.hardware.network_latency_s", 1e-3, "communication"),
        ("cluster.hardware.collective_call_s", 1e-2, "communication"),
        ("cluster.hardware.memory_bytes_per_s", 1e11, "optimizer"),
        ("depth.sampling", Sampling.independent, "wait by depth"),
        ("engine.zero_stage", 2, "wait by depth"),
        ("validation.every_steps", 16, "validation"),
        ("cluster.hardware.host_copy_bytes_per_s", 1e9, "saves"),
        ("cluster.hardware.failures_per_gpu_hour", 1e-4, "lost work"),
        ("cluster.hardware.requeue_s", 3000, "recovery"),
        ("cluster.hardware.start_s", 3000, "recovery"),
        ("cluster.hardware.detect_s", 3000, "recovery"),
        ("cluster.hardware.hang_share", 0.9, "recovery"),
        ("cluster.hardware.pinned_bytes_per_s", 1e5, "recovery"),
        ("cluster.hardware.storage_bytes_per_s", 1e6, "lost work"),
        ("cluster.hardware.storage_total_bytes_per_s", 1e8, "lost work"),
    ],
)
def test_every_assumption_shows_where_it_should(name, value, cause):
    before = estimate_of(EIGHT_HOSTS)
    after = estimate_of(EIGHT_HOSTS, {name: value})
    assert after.wall[cause] > 1.1 * before.wall[cause]
    assert after.hours > before.hours


def test_a_link_counts_where_it_is_the_slowest_edge():
    usual = estimate_of(EIGHT_HOSTS).step
    for name, value in (("link_bytes_per_s", 1e11), ("link_latency_s", 1e-3)):
        slow = estimate_of(EIGHT_HOSTS, {f"cluster.hardware.{name}": value}).step
        assert slow.communication_s > 1.5 * usual.communication_s


def test_faster_passes_make_faster_steps():
    base = estimate_of(EIGHT_HOSTS).step.total_s
    for name in ("cluster.hardware.forward_utilization", "cluster.utilization"):
        assert estimate_of(EIGHT_HOSTS, {name: 0.95}).step.total_s < base
    recomputed = estimate_of(EIGHT_HOSTS, RECOMPUTED).step
    # 8 iterations more than the 49 passes' worth that there are
    assert 1.1 < recomputed.total_s / base < 1.2


def test_more_gpus_finish_sooner_with_less_for_each():
    found = [estimate_of({"cluster.nodes": nodes}) for nodes in (1, 2, 4, 8)]
    hours = [e.hours for e in found]
    per_gpu = [e.tokens_per_s / n for e, n in zip(found, (8, 16, 32, 64), strict=True)]
    assert hours == sorted(hours, reverse=True)
    assert per_gpu == sorted(per_gpu, reverse=True)


def test_slow_gpus_never_seem_to_help():
    """Few clusters are drawn, each with its mirror image, so their mean is never below 1."""
    for sampling in Sampling:
        config = config_of(EIGHT_HOSTS, {"depth.sampling": sampling})
        for steps in (2, 3, 5):
            assert step_time(config, simulated(config, steps=steps)).straggler_s >= 0


def test_the_slowest_of_eight_gpus_is_as_slow_as_order_statistics_say():
    """The largest of 8 standard normals is 1.4236 on average, and spreads by 0.61: over 64 drawn
    clusters, which come in mirrored pairs, 4 standard errors are below 0.31."""
    config = config_of(LOCKSTEP, {"cluster.hardware.gpu_spread": 0.01})
    step = step_time(config, simulated(config, steps=2))
    assert step.straggler_s / step.compute_s == pytest.approx(0.014236, abs=0.0031)


def test_steps_with_known_depths_take_the_slowest_rank_and_the_exchange():
    config = config_of(EIGHT_HOSTS)
    totals = np.full((3, 512), 32)
    totals[1, 17] = 132
    seconds = step_seconds(config, totals)
    row = RowSeconds.of(config)
    assert seconds[0] == seconds[2]
    assert seconds[1] - seconds[0] == pytest.approx(100 * row.no_grad_s)
    step = step_time(config, simulated(config))
    fixed = step.communication_s + step.optimizer_s
    assert seconds[0] == pytest.approx(8 * row.at(24, 8, 0) + fixed)


def test_validation_costs_its_depths_and_rows():
    config = BASE
    few = config_of({"validation.depths": [8]})
    assert validation_s(few) < validation_s(config) / 4
    half = config_of({"validation.rows": config.validation.rows // 2})
    assert validation_s(half) == pytest.approx(validation_s(config) / 2)


@pytest.mark.parametrize(
    ("setting", "wrong"),
    [
        ("forward_utilization", 1.5),
        ("network_bytes_per_s", 0),
        ("gpu_spread", -0.1),
        ("hang_share", 2),
        ("overlap_share", 1.1),
        ("failures_per_gpu_hour", -1),
    ],
)
def test_impossible_hardware_is_refused(setting, wrong):
    with pytest.raises(ConfigError, match=rf"cluster.hardware.{setting}={wrong}"):
        config_of({f"cluster.hardware.{setting}": wrong})


def test_what_if_is_what_an_override_does():
    overrides = ["cluster.nodes=3", "cluster.hardware.gpu_spread=0.5", "depth.scope=step"]
    changes = {"cluster.nodes": 3, "cluster.hardware.gpu_spread": 0.5, "depth.scope": Scope.step}
    huginn = ["experiment=huginn-3.5b"]
    assert what_if(load("train", huginn), changes) == load("train", [*huginn, *overrides])
    with pytest.raises(TypeError, match="gpu_spred"):
        config_of({"cluster.hardware.gpu_spred": 1})
