"""The mean depth may grow over the first rows of a run, as a function of the global row alone."""

import dataclasses

import numpy as np
import pytest

from pretrain.errors import ConfigError
from pretrain.model.config import Curriculum, DepthConfig, Law
from pretrain.model.cost import mean_iterations
from pretrain.model.depth import at_row, means_of_run, settled, step_depths, step_totals

PLAIN = DepthConfig(law=Law.poisson_lognormal, mean=32, backprop=8)
LINEAR = dataclasses.replace(PLAIN, curriculum=Curriculum.linear, ramp_rows=6400)
SLOW = dataclasses.replace(LINEAR, curriculum=Curriculum.one_minus_sqrt)


def test_the_mean_follows_the_published_ramps() -> None:
    rows = [0, 1, 200, 201, 3200, 6399, 6400, 10**9]
    assert [at_row(LINEAR, row).mean for row in rows] == [1, 1, 1, 2, 16, 32, 32, 32]
    # 32 (1 - sqrt(1 - x)) at x = 1/2 is 9.37, rounded up
    assert [at_row(SLOW, row).mean for row in rows] == [1, 1, 1, 1, 10, 32, 32, 32]


@pytest.mark.parametrize("config", [LINEAR, SLOW], ids=["linear", "one_minus_sqrt"])
def test_steps_draw_from_the_law_of_their_first_row(config: DepthConfig) -> None:
    for first_row in (0, 640, 3200, 6336):
        mean = at_row(config, first_row).mean
        plain = dataclasses.replace(PLAIN, mean=mean)
        arguments = {"seed": 3, "first_row": first_row, "rows": 64}
        assert step_depths(config, **arguments) == step_depths(plain, **arguments)
    after = {"seed": 3, "first_row": 6400, "rows": 64}
    assert step_depths(config, **after) == step_depths(PLAIN, **after)
    assert settled(config) == PLAIN


@pytest.mark.parametrize("config", [LINEAR, SLOW], ids=["linear", "one_minus_sqrt"])
@pytest.mark.parametrize("rows", [1600, 6400, 25_600])
def test_shares_of_the_run_are_those_of_its_steps(config: DepthConfig, rows: int) -> None:
    means = [at_row(config, row).mean for row in range(0, rows, 8)]
    for mean, share in means_of_run(config, rows):
        # a boundary may fall inside one of the steps of eight rows on either side
        assert means.count(mean) / len(means) == pytest.approx(share, abs=2 * 8 / rows)
    assert sum(share for _, share in means_of_run(config, rows)) == pytest.approx(1.0)


def test_expected_iterations_count_the_ramp() -> None:
    rows, step = 12_800, 64
    drawn = [step_totals(LINEAR, seed=0, first_row=row, rows=step) for row in range(0, rows, step)]
    no_grad, with_grad = mean_iterations(LINEAR, rows=rows)
    # stratified steps miss the law's mean by about 1 % of it; so does the step's first row's mean
    assert no_grad + with_grad == pytest.approx(np.mean(drawn), rel=0.02)
    assert no_grad + with_grad < sum(mean_iterations(PLAIN, rows=rows)) - 5


@pytest.mark.parametrize(
    ("curriculum", "ramp_rows"),
    [(Curriculum.none, 10), (Curriculum.linear, 0), (Curriculum.linear, -1)],
)
def test_half_a_curriculum_is_refused(curriculum: Curriculum, ramp_rows: int) -> None:
    with pytest.raises(ConfigError, match=r"depth\.curriculum=.* with depth\.ramp_rows="):
        dataclasses.replace(PLAIN, curriculum=curriculum, ramp_rows=ramp_rows)
