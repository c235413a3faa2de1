"""Kills at random moments of random ranks, life after life: the run ends as if there were none."""

import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest
from lives import GRACE_S, STEPS, Life, check_same, finish, read_steps, row

pytestmark = pytest.mark.faults
# Lives of one run; each ends by a kill, then one ends by itself.
KILLS_PER_RUN = 5


class Kill(NamedTuple):
    """One kill, and what its life was doing."""

    ranks: int
    victim: int
    after_s: float
    steps: int
    """Steps that the record had."""
    was_saving: bool
    """A checkpoint was on its way."""
    outlived: int
    """Ranks that a launcher would have had to end."""


def kill_lives(workspace: Path, name: str, draw: random.Random, *, ranks: int) -> list[Kill]:
    """Kill lives of a run until enough of them died of it."""
    kills: list[Kill] = []
    # of the fastest life that was seen here; start-up, steps, saves and the end are all inside
    longest_s = 1.8 + 0.6 * ranks
    while len(kills) < KILLS_PER_RUN:
        with Life(workspace, name, "checkpoint.every_steps=2", ranks=ranks) as life:
            after_s = draw.uniform(0.05, longest_s)
            life.processes[0].join(after_s)
            victim = draw.randrange(ranks)
            if not life.processes[victim].is_alive():
                # it was faster: the run is over, or nearly
                assert life.wait() == [0] * ranks, life.said()
                return kills
            life.processes[victim].kill()
            saving = any((life.run_dir / "checkpoints").glob("step-*.tmp-*"))
            steps = max(read_steps(life.run_dir), default=0)
            deadline = time.monotonic() + GRACE_S
            for process in life.processes:
                process.join(max(0.0, deadline - time.monotonic()))
            outlived = sum(process.is_alive() for process in life.processes)
            kills.append(Kill(ranks, victim, after_s, steps, saving, outlived))
    return kills


def kill_and_compare(
    workspace: Path, whole: Callable[[int], Path], *, seed: int, wanted: int, beside: int
) -> list[Kill]:
    """Runs are killed and compared, `beside` of them at a time, until there were enough kills."""
    undisturbed = {ranks: whole(ranks) for ranks in (1, 2, 3)}

    def one_run(number: int) -> list[Kill]:
        draw, ranks = random.Random(number), 1 + number % 3
        name = f"kills-{number}"
        kills = kill_lives(workspace, name, draw, ranks=ranks)
        run_dir = finish(workspace, name, "checkpoint.every_steps=2", ranks=ranks)
        check_same(run_dir, undisturbed[ranks])
        return kills

    kills: list[Kill] = []
    with ThreadPoolExecutor(beside) as pool:
        for first in count(seed, beside):
            if len(kills) >= wanted:
                return kills
            for of_run in pool.map(one_run, range(first, first + beside)):
                kills += of_run
            print(f"{len(kills)} of {wanted} kills", flush=True)
    raise AssertionError("unreachable")


def summary(kills: list[Kill]) -> str:
    """How the kills were spread."""
    at = Counter(
        "before step 1" if kill.steps == 0 else
        "after the last step" if kill.steps == STEPS else "between"
        for kill in kills
    )  # fmt: skip
    return (
        f"{len(kills)} kills, {sum(kill.was_saving for kill in kills)} of them while a save was "
        f"on its way; {dict(at)}; by ranks {dict(Counter(kill.ranks for kill in kills))}; "
        f"of rank 0 {sum(kill.victim == 0 for kill in kills)}; ranks left for a launcher to end "
        f"{sum(kill.outlived for kill in kills)}"
    )


@row(
    "ten kills -9 of random ranks at random moments, on one to three ranks",
    "resumed life after life; record, weights and moments are equal bit for bit",
)
def test_ten_kills_change_nothing(workspace: Path, whole: Callable[[int], Path]) -> None:
    kills = kill_and_compare(workspace, whole, seed=1000, wanted=10, beside=1)
    print(summary(kills))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@row(
    "two hundred of them, at least ten while a save is on its way",
    "the same",
)
def test_two_hundred_kills_change_nothing(workspace: Path, whole: Callable[[int], Path]) -> None:
    kills = kill_and_compare(workspace, whole, seed=0, wanted=200, beside=2)
    print(summary(kills))
    assert sum(kill.was_saving for kill in kills) >= 10
