"""Who is blamed when a job stands still."""

import json
import timeit
from pathlib import Path

import pytest

from pretrain.engine.world import World
from pretrain.errors import EXIT_STALLED
from pretrain.loop.watchdog import Beat, Watchdog, verdict_of
from pretrain.testing import RanksError, load_module, run_ranks

RANKS = load_module(Path(__file__).with_name("watch_ranks.py"))


def beat(told: int, entered: int, phase: str = "reduce", step: int = 7) -> Beat:
    return Beat(told, entered, step, phase, 9.0, "node")


def test_a_rank_whose_thread_is_silent_is_blamed_before_one_that_is_behind() -> None:
    before = [beat(3, 50), beat(3, 41, "data"), beat(3, 50)]
    after = [beat(7, 50), beat(3, 41, "data"), beat(7, 48, "forward")]
    said = verdict_of(before, after)
    assert said.startswith("1 of 3 ranks are silent")
    assert "rank 1 on node was last seen in data of step 7 for 9 s" in said
    assert "rank 2" not in said


def test_a_rank_that_was_never_heard_is_silent() -> None:
    assert "rank 1 (never seen)" in verdict_of([beat(1, 1), None], [beat(2, 1), None])


def test_the_ranks_that_are_behind_hold_up_the_others() -> None:
    before = [beat(3, 50), beat(3, 41, "data"), beat(3, 44, "forward"), beat(3, 50)]
    after = [other._replace(told=9) for other in before]
    said = verdict_of(before, after)
    assert said.startswith("2 of 4 ranks hold up the others: rank 1 on node is in data of step 7")
    assert "rank 2 on node is in forward of step 7" in said
    assert said.endswith("The others wait in reduce of step 7.")


def test_where_nobody_is_behind_a_collective_or_a_device_hangs() -> None:
    said = verdict_of([beat(3, 50)] * 2, [beat(4, 50)] * 2)
    assert said.startswith("all 2 ranks are in reduce of step 7")


@pytest.mark.parametrize("keeper", [1, 0])
def test_a_rank_whose_interpreter_stands_still_is_silent(tmp_path: Path, keeper: int) -> None:
    """On rank 0 the store still answers then: it is served by another thread."""
    (tmp_path / "logs").mkdir()
    with pytest.raises(RanksError) as ended:
        run_ranks(RANKS.one_keeps_the_interpreter, 2, tmp_path, keeper)
    assert f"rank {1 - keeper}: ended with code {EXIT_STALLED}" in str(ended.value)
    (line,) = (tmp_path / "stalls.jsonl").read_text().splitlines()
    said = json.loads(line)["verdict"]
    assert "silent" in said
    assert f"rank {keeper} " in said
    assert "reduce of step 1" in said


def test_a_disk_that_hangs_does_not_keep_a_stalled_rank(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(RanksError) as ended:
        run_ranks(RANKS.one_cannot_write, 2, tmp_path)
    for rank in range(2):
        assert f"rank {rank}: ended with code {EXIT_STALLED}" in str(ended.value)
    assert "rank 1 on " in (tmp_path / "stalls.jsonl").read_text()


def test_saying_where_one_is_costs_nothing_beside_a_step(tmp_path) -> None:
    watch = Watchdog(World(0, 1, 0, None), tmp_path, limit_s=60)
    seconds = min(timeit.repeat(lambda: watch.enter(1, "data"), number=1000, repeat=5)) / 1000
    # measured 0.4 us; a step enters some ten places and takes milliseconds at the least
    assert seconds < 20e-6
