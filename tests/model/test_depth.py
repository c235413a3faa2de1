"""The law of depths against the published sampler, and the promises of its deal."""

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.errors import ConfigError
from pretrain.model.config import DepthConfig, Law, Sampling, Scope
from pretrain.model.depth import (
    Depth,
    DepthLaw,
    core_work,
    num_lanes,
    split,
    step_depths,
    step_totals,
)

GOLDEN = Path(__file__).parent.parent / "golden"
PUBLISHED = DepthConfig(law=Law.poisson_lognormal, mean=32, backprop=8)
INDEPENDENT = dataclasses.replace(PUBLISHED, sampling=Sampling.independent)
# P(sqrt(n) D > 1.95) = 0.001 for Kolmogorov's distribution; for a discrete law it is smaller.
KOLMOGOROV_001 = 1.95


def kolmogorov_distance(counts, law):
    """Largest distance of the empirical CDF of counts[r] draws of depth r to the law's."""
    counts = np.asarray(counts)[1:]
    size = max(len(counts), len(law.cdf))
    empirical = np.pad(np.cumsum(counts), (0, size - len(counts)), mode="edge") / counts.sum()
    exact = np.pad(law.cdf, (0, size - len(law.cdf)), constant_values=1.0)
    return float(np.abs(empirical - exact).max())


def law_with_mean(mean):
    return DepthLaw.of(dataclasses.replace(PUBLISHED, mean=mean))


def published_counts():
    return json.loads((GOLDEN / "sampler.json").read_text())["histogram_total"]


def test_law_is_the_published_samplers():
    counts = published_counts()
    assert sum(counts) == 20_000
    critical = KOLMOGOROV_001 / math.sqrt(20_000)
    assert kolmogorov_distance(counts, law_with_mean(32)) < critical


@pytest.mark.parametrize("wrong_mean", [31, 33])
def test_comparison_would_notice_a_mean_that_is_off_by_one(wrong_mean):
    """Of 200 samples as large as the published one from a law that is off by one, all but 2 or
    fewer are told apart: a power of at least 0.97 with 95 % confidence, at a level of 0.001."""
    critical = KOLMOGOROV_001 / math.sqrt(20_000)
    assert kolmogorov_distance(published_counts(), law_with_mean(wrong_mean)) > critical
    generator = np.random.default_rng(0)
    draws = generator.multinomial(20_000, law_with_mean(wrong_mean).pmf, size=200)
    distances = [
        kolmogorov_distance(np.concatenate([[0], counts]), law_with_mean(32)) for counts in draws
    ]
    assert np.sum(np.array(distances) <= critical) <= 2


@pytest.mark.parametrize("setting", ["mean4_bp2", "mean8_bp4", "mean16_bp8", "mean1_bp1"])
def test_law_has_the_published_means_at_other_settings(setting):
    """Within 4 standard errors of 5,000 draws."""
    golden = json.loads((GOLDEN / "sampler.json").read_text())["other_settings"][setting]
    mean, backprop = (int(part.strip("meanbp")) for part in setting.split("_"))
    law = DepthLaw.of(dataclasses.replace(PUBLISHED, mean=mean, backprop=backprop))
    spread = math.sqrt(mean + mean**2 * math.expm1(0.25))
    assert law.mean == pytest.approx(golden["mean_total"], abs=4 * spread / math.sqrt(5_000))
    with_grad = law.expect(np.minimum(law.depths, backprop).astype(float))
    assert with_grad == pytest.approx(golden["mean_k"], abs=4 * backprop / 2 / math.sqrt(5_000))


@pytest.mark.parametrize(("mean", "sigma"), [(1, 0.5), (8, 0.1), (32, 0.5), (32, 1.0), (200, 0.5)])
def test_moments_are_those_of_one_plus_poisson_of_lognormal(mean, sigma):
    """Closed forms: mean 1 + m, variance m + m^2 (exp(sigma^2) - 1).

    The tail beyond 8.3 sigma holds 1e-16 of the probability and, weighted by exp(2 sigma z), less
    than 1e-9 of the second moment for sigma up to 1.
    """
    law = DepthLaw.of(dataclasses.replace(PUBLISHED, mean=mean, sigma=sigma))
    second = law.expect(law.depths.astype(float) ** 2)
    assert law.mean == pytest.approx(mean + 1, rel=1e-9)
    variance = mean + mean**2 * math.expm1(sigma**2)
    assert second - law.mean**2 == pytest.approx(variance, rel=1e-7)


def test_quantile_is_the_smallest_depth_above_the_uniform():
    law = law_with_mean(32)
    assert law.quantile(np.array([0.0, 1.0 - 2.0**-53])).tolist()[0] == 1
    edges = law.cdf[:100]
    assert law.quantile(edges).tolist() == list(range(2, 102))
    assert law.quantile(np.nextafter(edges, 0)).tolist() == list(range(1, 101))
    fixed = DepthLaw.of(dataclasses.replace(PUBLISHED, law=Law.fixed))
    assert set(fixed.quantile(np.linspace(0, 1 - 2.0**-53, 50)).tolist()) == {32}


def test_last_iterations_carry_gradient():
    assert [split(total, 8) for total in (1, 8, 9, 33)] == [(0, 1), (0, 8), (1, 8), (25, 8)]
    assert Depth(25, 8).total == 33
    assert core_work(np.array([3, 33]), 8).tolist() == [12, 57]


# Digests of the depths, so that a change of numpy or of the deal cannot pass unseen: it would
# break the resume of every run.
DIGESTS = {
    (Scope.row, Sampling.stratified): "44850feb310ceb58",
    (Scope.row, Sampling.independent): "f605ee6a92210c5d",
    (Scope.block, Sampling.stratified): "efe1c151a1440d12",
    (Scope.block, Sampling.independent): "3756e0a30e2d9a07",
    (Scope.step, Sampling.stratified): "56ba7d8b2e71033a",
    (Scope.step, Sampling.independent): "3c6747843c681453",
}


def digest(config):
    totals = [step_totals(config, seed=7, first_row=96 * step, rows=96) for step in range(5)]
    return hashlib.sha256(np.stack(totals).astype("<i8").tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(("scope", "sampling"), DIGESTS)
def test_depths_are_the_same_for_ever(scope, sampling):
    block_rows = 4 if scope is Scope.block else 1
    config = dataclasses.replace(PUBLISHED, scope=scope, sampling=sampling, block_rows=block_rows)
    assert digest(config) == DIGESTS[scope, sampling]


def test_depths_depend_on_their_arguments_alone():
    def depths(**changes):
        return step_depths(PUBLISHED, **({"seed": 3, "first_row": 128, "rows": 64} | changes))

    first = depths()
    np.random.seed(0)
    step_depths(PUBLISHED, seed=4, first_row=0, rows=8)
    assert depths() == first
    assert depths(seed=4) != first
    assert depths(first_row=192) != first
    assert depths(rows=128)[:64] != first


def test_depths_know_neither_torch_nor_the_processs_rank():
    program = (
        "import sys; from pretrain.model.depth import *; from pretrain.model.config import *;"
        "config = DepthConfig(law=Law.poisson_lognormal, mean=32, backprop=8);"
        "print(step_depths(config, seed=3, first_row=64, rows=64), 'torch' in sys.modules)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "RANK": rank, "WORLD_SIZE": size, "PYTHONHASHSEED": rank},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for rank, size in (("0", "1"), ("3", "8"))
    }
    expected = step_depths(PUBLISHED, seed=3, first_row=64, rows=64)
    assert outputs == {f"{expected} False\n"}


@pytest.mark.parametrize("sampling", Sampling)
def test_every_row_follows_the_law(sampling):
    """Each of 16 rows over 1,500 steps: distance at a level of 0.001 / 16, mean within 4.5 sigma.

    A row that always got the longest draw of its lane, or of its step, would be far outside.
    """
    config = dataclasses.replace(PUBLISHED, sampling=sampling)
    steps, rows = 1_500, 16
    totals = np.stack(
        [step_totals(config, seed=11, first_row=step * rows, rows=rows) for step in range(steps)]
    )
    law = DepthLaw.of(config)
    spread = math.sqrt(law.expect((law.depths - law.mean) ** 2))
    for row in range(rows):
        # P(sqrt(n) D > 2.28) = 0.001 / 16
        assert kolmogorov_distance(np.bincount(totals[:, row]), law) < 2.28 / math.sqrt(steps)
        assert abs(totals[:, row].mean() - law.mean) < 4.5 * spread / math.sqrt(steps)


def test_neighbours_inside_and_across_lanes_are_exchangeable():
    """In 16 rows of 2 lanes a row is deeper than its neighbour as often as less deep, wherever the
    pair lies: within 4.5 standard deviations of a fair coin over 1,000 steps."""
    totals = np.stack(
        [step_totals(PUBLISHED, seed=5, first_row=16 * step, rows=16) for step in range(1_000)]
    )
    sign = np.sign(totals[:, 1:] - totals[:, :-1]).sum(axis=0)
    assert np.abs(sign).max() < 4.5 * math.sqrt(1_000)


@pytest.mark.parametrize(("rows", "expected", "steps"), [(512, 0.0020, 60), (4096, 0.0003, 24)])
def test_stratified_steps_cost_nearly_the_same(rows, expected, steps):
    """The coefficient of variation as first simulated; it is known to within a factor
    1 + 3.3 / sqrt(2 steps) either way (0.1 %), plus the rounding of its one printed digit."""
    work = [
        core_work(step_totals(PUBLISHED, seed=1, first_row=step * rows, rows=rows), 8).sum()
        for step in range(steps)
    ]
    variation = np.std(work, ddof=1) / np.mean(work)
    slack = 1 + 3.3 / math.sqrt(2 * steps)
    rounding = 5e-5 if rows == 4096 else 5e-4
    assert (expected - rounding) / slack < variation < (expected + rounding) * slack
    # independent draws: standard deviation of one row's work over sqrt(rows)
    law = DepthLaw.of(PUBLISHED)
    cost = core_work(law.depths, 8).astype(float)
    one_row = math.sqrt(law.expect(cost**2) - law.expect(cost) ** 2) / law.expect(cost)
    assert variation < 0.2 * one_row / math.sqrt(rows)


@settings(max_examples=60, deadline=None)
@given(
    lanes=st.integers(1, 12),
    room=st.integers(1, 12),
    block_rows=st.integers(1, 3),
    seed=st.integers(0, 2**63),
    step=st.integers(0, 10**9),
)
def test_a_step_covers_the_quantiles_evenly_whatever_the_lanes(lanes, room, block_rows, seed, step):
    config = dataclasses.replace(
        PUBLISHED,
        scope=Scope.block if block_rows > 1 else Scope.row,
        block_rows=block_rows,
        lanes=lanes,
    )
    draws = lanes * room
    rows = draws * block_rows
    totals = step_totals(config, seed=seed, first_row=step * rows, rows=rows)
    blocks = totals.reshape(draws, block_rows)
    assert (blocks == blocks[:, :1]).all()
    ordered = np.sort(blocks[:, 0])
    law = DepthLaw.of(config)
    # the j-th shallowest lies between the quantiles j / draws and (j + 1) / draws
    assert (ordered >= law.quantile(np.arange(draws) / draws)).all()
    assert (ordered <= law.quantile(np.minimum((np.arange(draws) + 1) / draws, 1 - 2**-53))).all()


def test_scope_block_shares_a_depth_between_consecutive_rows_only():
    config = dataclasses.replace(PUBLISHED, scope=Scope.block, block_rows=4)
    totals = step_totals(config, seed=0, first_row=0, rows=256).reshape(64, 4)
    assert (totals == totals[:, :1]).all()
    assert len(set(totals[:, 0].tolist())) > 25
    one_row = dataclasses.replace(config, block_rows=1)
    rows = step_totals(one_row, seed=0, first_row=0, rows=256)
    assert rows.tolist() == step_totals(PUBLISHED, seed=0, first_row=0, rows=256).tolist()


def test_scope_step_has_one_depth_and_stratifies_over_steps():
    """Over 144 steps the depths are within 2 / 144 of the law's CDF, whatever the seed.

    Denjoy-Koksma: over a Fibonacci number N of steps of the golden rotation, any arc is hit N
    times its length to within its variation, 2. Independent steps are 0.87 / sqrt(144) off.
    """
    distances = {}
    for sampling in Sampling:
        config = dataclasses.replace(PUBLISHED, scope=Scope.step, sampling=sampling)
        found = []
        for seed in range(20):
            steps = [step_totals(config, seed=seed, first_row=8 * s, rows=8) for s in range(144)]
            assert all((totals == totals[0]).all() for totals in steps)
            counts = np.bincount([totals[0] for totals in steps])
            found.append(kolmogorov_distance(counts, DepthLaw.of(config)))
        distances[sampling] = np.array(found)
    assert distances[Sampling.stratified].max() <= 2 / 144 + 1e-12
    assert 0.04 < distances[Sampling.independent].mean() < 0.11


@pytest.mark.parametrize(
    ("rows", "lanes"), [(1, 1), (7, 1), (8, 1), (12, 1), (20, 2), (64, 8), (100, 10), (4096, 512)]
)
def test_default_lanes_are_the_largest_divisor_up_to_an_eighth_of_the_rows(rows, lanes):
    assert num_lanes(PUBLISHED, rows) == lanes


def test_refusals_name_the_numbers_and_a_remedy():
    with pytest.raises(ConfigError, match=r"depth\.lanes=7 does not divide the 64 .* nearest: 4"):
        step_depths(dataclasses.replace(PUBLISHED, lanes=7), seed=0, first_row=0, rows=64)
    block = dataclasses.replace(PUBLISHED, scope=Scope.block, block_rows=6)
    with pytest.raises(ConfigError, match=r"depth\.block_rows=6 does not divide the 64 rows"):
        step_depths(block, seed=0, first_row=0, rows=64)
    with pytest.raises(ConfigError, match=r"depth\.lanes=4 would do nothing.*depth\.lanes=null"):
        dataclasses.replace(INDEPENDENT, lanes=4)
    with pytest.raises(ConfigError, match=r"depth\.lanes=4 would do nothing"):
        dataclasses.replace(PUBLISHED, scope=Scope.step, lanes=4)
    with pytest.raises(ConfigError, match=r"depth\.block_rows=2 would do nothing"):
        dataclasses.replace(PUBLISHED, block_rows=2)
    with pytest.raises(ConfigError, match=r"smaller depth\.sigma"):
        DepthLaw.of(dataclasses.replace(PUBLISHED, sigma=3.0))
    with pytest.raises(ConfigError, match="0 rows"):
        step_depths(PUBLISHED, seed=0, first_row=0, rows=0)
