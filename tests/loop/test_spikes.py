"""The ladder against loss spikes: what counts as one, and what follows from it."""

import math
import random

import pytest

from pretrain.errors import CheckpointError, ConfigError
from pretrain.loop.guard_config import GuardConfig, SpikeConfig
from pretrain.loop.passed_over import Rewind, append_rewind, read_rewinds, row_after, windows
from pretrain.loop.spikes import judge, must_rewind, note
from pretrain.loop.state import TrainState

LIMITS = SpikeConfig(window_steps=16, alert_score=6, skip_score=12, rewind_after=3)


def after(losses: list[float], limits: SpikeConfig = LIMITS) -> TrainState:
    state = TrainState()
    for loss in losses:
        note(state, loss, judge(state, loss, limits), limits)
    return state


def noisy(count: int, *, level: float = 3.0, noise: float = 0.01) -> list[float]:
    draw = random.Random(0)
    return [draw.gauss(level, noise) for _ in range(count)]


def test_ordinary_noise_and_a_falling_loss_are_no_spikes() -> None:
    usual = SpikeConfig()
    assert after(noisy(5000), usual).spikes == 0
    assert after([8.0 * 0.99**i for i in range(500)], usual).spikes == 0


def test_the_score_is_in_robust_deviations_of_the_good_steps() -> None:
    # half of them 0.01 from the median
    state = after([3.0, 2.99, 3.01, 3.0] * 4)
    mad = 0.005
    verdict = judge(state, 3.0 + 7 * 1.4826 * mad, LIMITS)
    assert verdict.score == pytest.approx(7.0)
    assert verdict.is_spike
    assert not verdict.drops_update
    assert judge(state, 3.0 + 12.1 * 1.4826 * mad, LIMITS).drops_update
    assert not judge(state, 3.0 + 5.9 * 1.4826 * mad, LIMITS).is_spike
    assert not judge(state, 2.0, LIMITS).is_spike


def test_losses_that_are_all_alike_do_not_make_the_last_digit_a_spike() -> None:
    state = after([3.0] * 20)
    assert not judge(state, 3.005, LIMITS).is_spike
    assert judge(state, 3.007, LIMITS).is_spike


def test_there_is_no_verdict_before_the_window_is_full() -> None:
    state = after(noisy(15))
    assert judge(state, 100.0, LIMITS) == (0.0, False, False)
    note(state, 3.0, judge(state, 3.0, LIMITS), LIMITS)
    assert judge(state, 100.0, LIMITS).drops_update


def test_a_loss_that_is_not_finite_is_a_spike_at_any_time() -> None:
    for loss in (math.nan, math.inf):
        assert judge(TrainState(), loss, LIMITS) == (math.inf, True, True)


def test_spikes_are_not_what_later_losses_are_compared_with() -> None:
    state = after([*noisy(16), *[9.0] * 100])
    assert state.spikes == 100
    assert max(state.good_losses) < 4
    assert len(state.good_losses) == 16


def test_a_resumed_run_judges_as_the_uninterrupted_one() -> None:
    losses = [*noisy(40), 3.05, *noisy(10), 4.0]
    whole = after(losses)
    resumed = TrainState.from_dict(after(losses[:43]).as_dict())
    for loss in losses[43:]:
        note(resumed, loss, judge(resumed, loss, LIMITS), LIMITS)
    assert resumed == whole
    assert whole.spikes > 0


def test_only_so_many_bad_steps_in_a_row_lead_back() -> None:
    for bad, expected in ((0, False), (1, False), (3, True), (4, False), (6, True)):
        assert must_rewind(TrainState(bad_in_a_row=bad), LIMITS) is expected
    never = SpikeConfig(rewind_after=0)
    assert not must_rewind(TrainState(bad_in_a_row=8), never)


def test_rows_are_passed_over_once_and_chains_of_windows_are_followed(tmp_path) -> None:
    assert read_rewinds(tmp_path) == []
    first, second = Rewind(9, 4, 64, 144), Rewind(14, 8, 144, 224)
    append_rewind(tmp_path, first)
    append_rewind(tmp_path, second)
    rewinds = read_rewinds(tmp_path)
    assert rewinds == [first, second]
    assert [row_after(rewinds, row) for row in (0, 48, 64, 80, 144, 224)] == [
        0, 48, 224, 224, 224, 224,
    ]  # fmt: skip
    # and in whichever order they were written
    assert [row_after([second, first], row) for row in (48, 64, 144)] == [48, 224, 224]
    again = Rewind(12, 8, 144, 192), Rewind(16, 2, 32, 240)
    assert windows([first, second], before=300) == [(64, 144), (144, 224)]
    assert windows([again[0], second], before=300) == [(144, 192), (192, 224)]
    assert windows([first, second, *again], before=200) == [(32, 200)]
    (tmp_path / "rewinds.jsonl").write_text('{"from_step": 1}\n')
    with pytest.raises(CheckpointError, match="Restore the file"):
        read_rewinds(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"window_steps": 4}, "window_steps=4"),
        ({"alert_score": 20.0}, "alert_score=20"),
        ({"alert_score": 0.0}, "alert_score=0"),
        ({"rewind_after": -1}, "rewind_after=-1"),
    ],
)
def test_limits_that_make_no_sense_are_refused(changes: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SpikeConfig(**changes)
    for name in ("stop_after_skips", "stall_s", "straggler_ratio"):
        with pytest.raises(ConfigError, match=name):
            GuardConfig(**{name: 0})
