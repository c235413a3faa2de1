"""A slow rank is found by its time for equal work, not by its time."""

import json
import statistics
import sys
from pathlib import Path

import pytest
from lives import finish

from pretrain.engine.world import World
from pretrain.loop.guard_config import GuardConfig
from pretrain.loop.stragglers import Stragglers
from pretrain.testing import load_module, run_ranks

sys.path.append(str(Path(__file__).parent))

from watch_ranks import slow_down_rank_1

RANKS = load_module(Path(__file__).with_name("watch_ranks.py"))


def test_the_rank_that_is_slow_at_its_own_work_is_named() -> None:
    # rank 2 has the most work; rank 1 is the slow one
    outcomes = run_ranks(RANKS.one_is_slow, 3, 1)
    for rank, (found, said) in enumerate(outcomes):
        assert [bool(metrics) for metrics in found] == [False, False, False, True] * 2
        assert found[3]["ranks/slowest"] == 1
        assert found[3]["ranks/slowest_ratio"] == pytest.approx(2)
        assert len(said) == (2 if rank == 0 else 0)
    assert "rank 1 on " in outcomes[0][1][0]
    assert "rank 2" not in outcomes[0][1][0]


def test_equal_ranks_are_not_blamed() -> None:
    outcomes = run_ranks(RANKS.one_is_slow, 3, 99)
    assert outcomes[0][1] == []


def test_a_rank_alone_is_nobodys_straggler() -> None:
    alone = Stragglers(World(0, 1, 0, None), GuardConfig(straggler_every_steps=1))
    assert alone.add(own_s=9.0, iterations=1) == {}


@pytest.mark.parametrize("stage", [1, 2])
def test_a_rank_that_is_slow_in_a_run_is_named_although_the_others_wait_for_it(
    workspace: Path, stage: int
) -> None:
    """They wait for its gradients: under stage 2 in every backward pass, under 1 at their end."""
    run_dir = finish(
        workspace, f"straggler-{stage}", f"engine.zero_stage={stage}", "engine.precision=bf16",
        "run.steps=4", "guards.straggler_every_steps=2", "data.loader_workers=0",
        ranks=2, before=slow_down_rank_1,
    )  # fmt: skip
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss/nats" in record]
    found = [record for record in records if "ranks/slowest" in record]
    assert [record["step"] for record in found] == [2, 4]
    # the first steps also start what reads rows
    assert found[1]["ranks/slowest"] == 1
    # of two, whose mean is the median: 2 at most
    assert found[1]["ranks/slowest_ratio"] > 1.2
    if stage == 1:
        # two passes of 0.2 s more: one rank waits so long, half of it is above the mean
        # medians of the steps after the first: a pause of the machine may hit one of them
        wait_s, forward_s, backward_s = (
            statistics.median(record[f"time/{name}_s"] for record in records[1:])
            for name in ("wait", "forward", "backward")
        )
        assert wait_s > 0.15
        assert backward_s < forward_s
