"""A run that changes its ranks and its ZeRO stage goes on as the same run."""

import hashlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
from lives import STEPS, Life, finish, read_steps

from pretrain.engine.checkpoint import load_weights, read_optimizer_steps
from pretrain.testing import load_module, run_ranks

sys.path.append(str(Path(__file__).parent))

from elastic_ranks import write_down_rows

RANKS = load_module(Path(__file__).with_name("elastic_ranks.py"))
CHAIN = [(1, 1), (2, 3), (3, 2), (4, 3), (1, 1)]
"""Ranks and stages, one after the other."""


def test_weights_and_moments_pass_through_all_topologies_bit_by_bit(tmp_path: Path) -> None:
    (ranks, stage), *others = CHAIN
    first = run_ranks(RANKS.first_save, ranks, tmp_path / "0", stage)[0]
    wanted = {s: load_weights(first, s) for s in ("master", "exp_avg", "exp_avg_sq")}
    before = first
    for number, (ranks, stage) in enumerate(others, start=1):
        before = run_ranks(RANKS.pass_on, ranks, before, tmp_path / str(number), stage)[0]
        assert len(list(before.glob("rank-*"))) == ranks
        assert read_optimizer_steps(before) == 7
        for section, tensors in wanted.items():
            found = load_weights(before, section)
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[name], tensors[name]) for name in tensors), section


def read_rows(workspace: Path) -> dict[int, str]:
    """What was written down of each row; every row must be there once."""
    lines = [
        line for path in (workspace / "rows").iterdir() for line in path.read_text().split("\n")
    ]
    pairs = [line.split() for line in lines if line]
    found = {int(number): digest for number, digest in pairs}
    assert len(found) == len(pairs), "a row twice"
    shutil.rmtree(workspace / "rows")
    return found


def stream_hash(rows: dict[int, str]) -> str:
    return hashlib.sha256(repr(sorted(rows.items())).encode()).hexdigest()


def test_the_stream_of_rows_is_the_same_over_the_whole_life(workspace: Path) -> None:
    """Tokens, labels, documents, depth and initial state of every row, exactly once."""
    alone = finish(workspace, "elastic-alone", "batch.micro_rows=1", before=write_down_rows)
    expected = read_rows(workspace)
    assert sorted(expected) == list(range(12 * STEPS))
    name, run_dir = "elastic-chain", alone.with_name("elastic-chain")
    for ranks, stage in CHAIN[:-1]:
        setting = ["batch.micro_rows=1", f"engine.zero_stage={stage}"]
        # a few steps more than the lives before: none is at its end before it hears of its stop
        stop_at = max(read_steps(run_dir), default=0) + 3
        with Life(workspace, name, *setting, ranks=ranks, before=write_down_rows) as life:
            life.until(lambda step=stop_at: life.has_step(step))
            life.processes[0].terminate()
            assert life.wait() == [75] * ranks, life.said()
    ranks, stage = CHAIN[-1]
    setting = ["batch.micro_rows=1", f"engine.zero_stage={stage}"]
    finish(workspace, name, *setting, ranks=ranks, before=write_down_rows)
    found = read_rows(workspace)
    assert stream_hash(found) == stream_hash(expected)
    steps, reference = read_steps(run_dir), read_steps(alone)
    assert list(steps) == list(range(1, STEPS + 1))
    for step, values in reference.items():
        # learning rate, checksum of the rows, mean depth, first row and tokens: exactly
        assert steps[step][2:] == values[2:]
        # fp32 sums in another order, 6e-8 each, which 30 steps of training let grow; another row
        # or another depth would move a loss by percents
        assert steps[step][0] == pytest.approx(values[0], rel=1e-3)
