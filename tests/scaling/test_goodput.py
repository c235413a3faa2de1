"""What failures cost: the formula against simulated lives, its limits, and Young's and Daly's."""

import dataclasses
import math

import numpy as np
import pytest

from pretrain.compose import load
from pretrain.scaling.goodput import Interruptions

DAILY = Interruptions(mtbf_s=86_400.0, recovery_s=600.0, copy_s=20.0, write_s=120.0, is_beside=True)
NOBODY_FAILS = dataclasses.replace(DAILY, mtbf_s=math.inf)


def simulate_lives(gone, work_s, *, saves, seed=0):
    """Shares of wall time of a job that fails and recovers, event by event, until `saves` count.

    A save makes training wait; it counts write_s after its copy, or at once if that was waited for.
    """
    generator = np.random.default_rng(seed)
    stall_s = gone.wait_s
    delay_s = gone.write_s if gone.is_beside else 0.0
    assert delay_s <= work_s
    clock = recovering_s = 0.0
    counted = 0
    fails_at = generator.exponential(gone.mtbf_s)
    while counted < saves:
        # a life from the last save that counts: its j-th save counts at this age
        started, done = clock, 0
        while started + (done + 1) * (work_s + stall_s) + delay_s < fails_at:
            done += 1
            if counted + done == saves:
                break
        counted += done
        if counted == saves:
            clock = started + done * (work_s + stall_s) + delay_s
            break
        clock = fails_at
        broke = clock
        while True:
            fails_at = clock + generator.exponential(gone.mtbf_s)
            if fails_at > clock + gone.recovery_s:
                clock += gone.recovery_s
                break
            clock = fails_at
        recovering_s += clock - broke
    return saves * work_s / clock, saves * stall_s / clock, recovering_s / clock


@pytest.mark.parametrize("is_beside", [True, False])
@pytest.mark.parametrize("mtbf_s", [86_400.0, 7_200.0])
def test_shares_are_those_of_simulated_lives(mtbf_s, is_beside):
    """20,000 saves and some 900 or more failures: their number, and with it what they cost, is
    known to about 3 %; 4 standard errors are 13 % of what is not useful."""
    gone = dataclasses.replace(DAILY, mtbf_s=mtbf_s, is_beside=is_beside)
    work_s = 3_600.0
    shares = gone.shares(work_s)
    useful, saving, recovering = simulate_lives(gone, work_s, saves=20_000)
    assert useful == pytest.approx(shares.useful, abs=0.13 * (1 - shares.useful))
    assert saving == pytest.approx(shares.saving, rel=0.13)
    assert recovering == pytest.approx(shares.recovering, rel=0.13)


@pytest.mark.parametrize("work_s", [10.0, 3_600.0, 86_400.0, 1e7])
@pytest.mark.parametrize("gone", [DAILY, NOBODY_FAILS, dataclasses.replace(DAILY, mtbf_s=60.0)])
def test_shares_add_up_and_none_is_negative(gone, work_s):
    shares = dataclasses.astuple(gone.shares(work_s))
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= -1e-12


def test_without_failures_only_saves_cost():
    shares = NOBODY_FAILS.shares(1_980.0)
    assert shares.useful == pytest.approx(0.99)
    assert shares.saving == pytest.approx(0.01)
    assert shares.lost == shares.recovering == 0
    rare = dataclasses.replace(DAILY, mtbf_s=1e12).shares(1_980.0)
    assert rare.useful == pytest.approx(0.99, abs=1e-6)


def test_a_save_that_is_due_too_soon_waits_for_the_one_before():
    assert NOBODY_FAILS.shares(100.0).useful == pytest.approx(100 / (100 + 20 + 20))
    assert NOBODY_FAILS.shares(120.0).useful == pytest.approx(120 / (120 + 20))


def test_more_failures_longer_recoveries_and_slower_copies_leave_less():
    for change in ({"mtbf_s": 43_200.0}, {"recovery_s": 1_200.0}, {"copy_s": 40.0}):
        worse = dataclasses.replace(DAILY, **change)
        assert worse.shares(3_600.0).useful < DAILY.shares(3_600.0).useful


@pytest.mark.parametrize(("stall_s", "mtbf_s"), [(10.0, 86_400.0), (60.0, 86_400.0)])
def test_best_interval_is_young_and_daly_and_that_of_simulated_lives(stall_s, mtbf_s):
    gone = Interruptions(
        mtbf_s=mtbf_s, recovery_s=300.0, copy_s=0.0, write_s=stall_s, is_beside=False
    )
    young = math.sqrt(2 * stall_s * mtbf_s)
    root = math.sqrt(stall_s / (2 * mtbf_s))
    daly = young * (1 + root / 3 + root**2 / 9) - stall_s
    best = gone.best_steps(1.0, limit=86_400, within=0.0)
    # the interval is searched in steps of 6 %
    assert best == pytest.approx(daly, rel=0.06)
    assert best == pytest.approx(young, rel=0.1)
    # the optimum is flat: common random failures tell twice and half apart from it
    useful = {
        factor: simulate_lives(gone, factor * daly, saves=int(20_000 / factor))[0]
        for factor in (0.25, 1, 4)
    }
    assert max(useful, key=useful.get) == 1


def test_of_nearly_equal_intervals_the_rarest_is_chosen():
    best = DAILY.best_steps(1.0, limit=86_400, within=0.0)
    chosen = DAILY.best_steps(1.0, limit=86_400)
    assert chosen > best
    assert DAILY.shares(chosen).useful >= DAILY.shares(best).useful - 1e-3
    assert DAILY.best_steps(1.0, limit=50) <= 50
    # nothing fails: the rarest of all
    assert NOBODY_FAILS.best_steps(1.0, limit=10**6) == 10**6


def test_a_job_that_fails_before_it_can_save_never_ends():
    hopeless = dataclasses.replace(DAILY, mtbf_s=10.0)
    assert hopeless.shares(86_400.0).useful < 1e-6


def test_a_run_fails_in_proportion_to_its_gpus_and_recovers_as_its_guards_allow():
    """Llama 3: 419 failures in 54 days on 16,384 GPUs."""
    config = load("train", ["experiment=huginn-3.5b", "cluster.nodes=2048"])
    found = Interruptions.of(config)
    assert found.mtbf_s == pytest.approx(54 * 86_400 / 419, rel=0.01)
    config = load("train", ["experiment=huginn-3.5b", "cluster.nodes=2048", "guards.stall_s=2200"])
    longer = Interruptions.of(config)
    assert longer.recovery_s - found.recovery_s == pytest.approx(0.1 * 1000)
    assert longer.mtbf_s == found.mtbf_s


def test_saves_take_what_was_measured_on_one_gpu():
    """reliability.csv: the copy 0.70 s, pinning 17 s more, writing 47 s; for 39.7 GB, while this
    config's checkpoint has 42.8 GB."""
    config = load("train", ["experiment=huginn-3.5b", "cluster.gpus_per_node=1"])
    found = Interruptions.of(config)
    larger = 42.78 / 39.67
    assert found.copy_s == pytest.approx(0.699 * larger, rel=0.05)
    assert found.write_s == pytest.approx(47.2 * larger, rel=0.02)
    waited = dataclasses.replace(
        config, checkpoint=dataclasses.replace(config.checkpoint, asynchronous=False)
    )
    assert Interruptions.of(waited).wait_s == found.write_s
    pinned = found.recovery_s - Interruptions.of(waited).recovery_s
    assert pinned == pytest.approx(17.0 * larger, rel=0.1)
