import pytest

from pretrain.errors import ConfigError
from pretrain.optim.config import CooldownShape, ScheduleConfig
from pretrain.optim.schedule import learning_rate, reaches_peak

STEP = 10


def rates(steps: int, *, warmup: int, cooldown: int, minimum: float = 0.0) -> list[float]:
    config = ScheduleConfig(
        warmup_tokens=warmup, cooldown_tokens=cooldown, min_learning_rate=minimum
    )
    return [
        learning_rate(
            index * STEP, step_tokens=STEP, total_tokens=steps * STEP, peak=2.0, config=config
        )
        for index in range(steps)
    ]


def test_rises_holds_and_falls_linearly() -> None:
    assert rates(10, warmup=4 * STEP, cooldown=2 * STEP) == [0.5, 1, 1.5, 2, 2, 2, 2, 2, 2, 1]


def test_equals_the_reference_in_the_rise() -> None:
    # The reference counts steps from 1: rate = peak * step / warmup steps.
    ours = rates(9, warmup=8 * STEP, cooldown=0)
    assert ours[:8] == pytest.approx([2.0 * step / 8 for step in range(1, 9)])


def test_one_minus_sqrt_falls_fast_then_slowly() -> None:
    config = ScheduleConfig(
        warmup_tokens=0,
        cooldown_tokens=4 * STEP,
        cooldown_shape=CooldownShape.one_minus_sqrt,
    )
    got = [
        learning_rate(i * STEP, step_tokens=STEP, total_tokens=80, peak=2.0, config=config)
        for i in range(8)
    ]
    # 1 - sqrt(x) at x = 0, 1/4, 1/2, 3/4 of the cool-down
    assert got == pytest.approx([2, 2, 2, 2, 2, 1, 2 - 2 * 0.5**0.5, 2 - 2 * 0.75**0.5])


def test_a_shape_without_a_cooldown_is_refused() -> None:
    with pytest.raises(ConfigError, match="cooldown_shape=one_minus_sqrt would do nothing"):
        ScheduleConfig(
            warmup_tokens=0, cooldown_tokens=0, cooldown_shape=CooldownShape.one_minus_sqrt
        )


def test_no_step_of_the_run_has_rate_zero() -> None:
    assert min(rates(7, warmup=3 * STEP, cooldown=7 * STEP)) > 0


def test_the_fall_stops_at_the_minimum_and_the_rise_does_not() -> None:
    got = rates(10, warmup=10, cooldown=10 * STEP, minimum=1.0)
    assert got[0] == 2.0
    assert got[-1] == 1.0
    assert rates(10, warmup=10 * STEP, cooldown=0, minimum=1.0)[0] == 0.2


def test_depends_on_tokens_not_on_steps() -> None:
    config = ScheduleConfig(warmup_tokens=640, cooldown_tokens=320)
    big = [
        learning_rate(t, step_tokens=64, total_tokens=1280, peak=1.0, config=config)
        for t in range(0, 1280, 64)
    ]
    # Steps of half the size pass through the same rates at the same token counts after the step.
    small = [
        learning_rate(t, step_tokens=32, total_tokens=1280, peak=1.0, config=config)
        for t in range(32, 640, 64)
    ]
    assert small == big[:10]


def test_after_the_end_the_rate_is_the_minimum() -> None:
    config = ScheduleConfig(warmup_tokens=0, cooldown_tokens=100, min_learning_rate=0.25)
    assert learning_rate(999, step_tokens=1, total_tokens=500, peak=1.0, config=config) == 0.25


def test_a_run_that_is_too_short_for_its_peak_is_known() -> None:
    answers = set()
    for steps in range(1, 12):
        for warmup in (0, 1, 35, 40):
            for cooldown in (0, 1, 35, 40):
                config = ScheduleConfig(warmup_tokens=warmup, cooldown_tokens=cooldown)
                reaches = reaches_peak(step_tokens=STEP, total_tokens=steps * STEP, config=config)
                assert reaches == (max(rates(steps, warmup=warmup, cooldown=cooldown)) == 2.0)
                answers.add(reaches)
    assert answers == {True, False}
