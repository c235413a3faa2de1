"""All ranks of a job: the command, equal ranks, and clocks."""

import random
import re
import time
from pathlib import Path

from conftest import SMALL
from pretrain.preflight.findings import Status
from pretrain.preflight.job import judge_clocks
from pretrain.testing import load_module, run_ranks, start_commands

RANKS = load_module(Path(__file__).with_name("job_ranks.py"))


def test_two_ranks_probe_their_job_and_rank_0_says_what_it_found(workspace, tmp_path) -> None:
    arguments = ["doctor", "doctor.scope=job", *SMALL, "engine=zero2-bf16", "engine.device=cpu"]
    begin = time.monotonic()
    processes = start_commands(2, arguments, cwd=workspace, output=tmp_path)
    try:
        for process in processes:
            process.join(timeout=240)
        assert [process.exitcode for process in processes] == [0, 0], texts(tmp_path)
    finally:
        for process in processes:
            process.kill()
    first, second = texts(tmp_path)
    for subject in ("ranks", "clock", "all-reduce", "links", "parity"):
        assert f"ok      {subject} " in first
    assert "ZeRO-2 bf16, overlap_comm on 2 ranks" in first
    assert "These 2 ranks can train" in first
    # another rank logs which kernels run, and is silent about what all have found
    findings = [
        line for line in first.splitlines() if line.startswith(("ok ", "warning ", "These"))
    ]
    assert len(findings) > 5
    assert [line for line in findings if line in second] == []
    assert not re.search("^(WARNING|ERROR|Traceback)", second, flags=re.M)
    print(f"{time.monotonic() - begin:.1f} s")


def texts(folder: Path) -> list[str]:
    return [(folder / f"{rank}.txt").read_text() for rank in range(2)]


def test_a_rank_with_another_configuration_is_named() -> None:
    for (finding,) in run_ranks(RANKS.unequal, 2):
        assert finding.status is Status.missing
        assert "rank 1 on beta" in finding.detail
        assert "config" in finding.detail


def readings(offsets: list[float], jitter_s: float) -> list[list[float]]:
    draw = random.Random(0)
    return [
        [1e9 + second + offset + draw.uniform(0, jitter_s) for second in range(9)]
        for offset in offsets
    ]


def test_a_clock_that_is_apart_is_named_by_its_node() -> None:
    found = [*judge_clocks(readings([0.0, 0.0, -7.0, -7.0], 0.01), ["a", "a", "b", "b"])]
    (finding,) = found
    assert finding.status is Status.warn
    assert "b is -7.0" in finding.detail
    assert "from a" in finding.detail


def test_clocks_that_agree_within_what_can_be_seen_are_ok() -> None:
    (finding,) = judge_clocks(readings([0.0, 0.3], 0.01), "ab")
    assert finding.status is Status.ok
    assert "0.3" in finding.detail
    # meetings that ranks leave seconds apart prove nothing
    (finding,) = judge_clocks(readings([0.0, 1.5], 8.0), "ab")
    assert finding.status is Status.ok
