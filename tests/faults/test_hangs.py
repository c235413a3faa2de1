"""Ranks that stand still are named, and the job ends so that it can be started again."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lives import Life, check_same, finish, read_steps, row

from pretrain.errors import EXIT_STALLED

pytestmark = pytest.mark.faults
LIMIT = "guards.stall_s=2"


@pytest.mark.parametrize("stopped", [1, 0])
@row(
    "SIGSTOP of rank 1 of three, and of rank 0",
    "named as silent in stalls.jsonl, the others end with 76 and leave their stacks",
)
def test_a_rank_that_is_stopped_is_named_and_the_others_end(
    workspace: Path, whole: Callable[[int], Path], stopped: int
) -> None:
    name = f"stopped-{stopped}"
    with Life(workspace, name, LIMIT, ranks=3) as life:
        life.until(lambda: life.has_step(3))
        os.kill(life.processes[stopped].pid, signal.SIGSTOP)
        started = time.monotonic()
        others = [p for rank, p in enumerate(life.processes) if rank != stopped]
        for process in others:
            process.join(120)
        assert [process.exitcode for process in others] == [EXIT_STALLED] * 2
        # far below the half hour after which a collective gives up
        assert time.monotonic() - started < 60
        said = (life.run_dir / "stalls.jsonl").read_text()
        assert f"rank {stopped} " in said
        assert "silent" in said
        stacks = life.run_dir / f"logs/rank-{2:05d}.stacks"
        assert "pretrain/train.py" in stacks.read_text()
        last = json.loads(stacks.with_suffix(".flight.json").read_text())["entries"]
        assert any("all_reduce" in entry["profiling_name"] for entry in last)
    run_dir = finish(workspace, name, ranks=3)
    check_same(run_dir, whole(3))


@row(
    "the reader of one rank of two is stopped",
    "that rank is named with its phase, `data`; both end with 76",
)
def test_a_rank_that_waits_for_data_is_named_with_its_phase(
    workspace: Path, whole: Callable[[int], Path]
) -> None:
    """The reader of one rank is stopped: that rank waits for rows, the other for that rank."""
    name = "starved"
    # whose threads may miss their turn for a fifth of this before the rank counts as silent
    limit = "guards.stall_s=6"
    with Life(workspace, name, limit, "data.loader_workers=1", ranks=2) as life:
        life.until(lambda: life.has_step(3))
        (reader,) = children_of(life.processes[1].pid)
        os.kill(reader, signal.SIGSTOP)
        try:
            assert life.wait() == [EXIT_STALLED] * 2
        finally:
            os.kill(reader, signal.SIGKILL)
        said = (life.run_dir / "stalls.jsonl").read_text()
        assert "1 of 2 ranks hold up the others: rank 1 on " in said
        assert "is in data of step" in said
        assert "The others wait in count of step" in said
    check_same(finish(workspace, name, ranks=2), whole(2))


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@row(
    "all ranks are stopped for less than the limit, six times, and for longer than it together",
    "no alarm",
)
def test_slow_is_not_still(workspace: Path, whole: Callable[[int], Path]) -> None:
    """Ranks that are stopped for shorter than the limit, over and over, raise no alarm."""
    name = "slow"
    with Life(workspace, name, "guards.stall_s=4", ranks=2) as life:
        for _ in range(6):
            seen = max(read_steps(life.run_dir), default=0)
            life.until(lambda seen=seen: max(read_steps(life.run_dir), default=0) > seen)
            for process in life.processes:
                os.kill(process.pid, signal.SIGSTOP)
            time.sleep(0.9)
            for process in life.processes:
                os.kill(process.pid, signal.SIGCONT)
        assert life.wait() == [0, 0], life.said()
    assert not (life.run_dir / "stalls.jsonl").exists()
    check_same(life.run_dir, whole(2))
