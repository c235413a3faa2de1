"""Jobs that lose ranks and nodes go on by themselves, and end as if nothing had happened."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from lives import STEADY, check_same, read_steps
from watching import FINISHED, Watched

from conftest import SMALL
from pretrain.loop.lineage import Life
from pretrain.testing import start_commands

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS = 80
# rows of a step that two, three and four ranks can share
RUN = [*SMALL, "batch.global_tokens=768", "batch.micro_rows=2", f"run.steps={STEPS}",
       "checkpoint.every_steps=3", "validation.every_steps=50"]  # fmt: skip
SIGNAL, KILL, HANG, DOWN, LOST = (
    "SIGUSR1, as at the time limit",
    "kill -9 of one rank of two",
    "SIGSTOP of one rank of two (guards.stall_s=20)",
    "a node set DOWN",
    "slurmd of one node of four killed (SlurmdTimeout=10)",
)
ON_CPUS = ("--gpus-per-node=0", "--cpus-per-task=1")


@dataclass
class Day:
    """A job and all that was done to it."""

    watched: Watched
    job: dict[str, str]
    log: str
    faults: dict[str, int]
    """The number of the life that each fault met."""

    @property
    def lives(self) -> list[Life]:
        return self.watched.lives()

    def met(self, fault: str) -> Life:
        """The life that a fault met."""
        return self.lives[self.faults[fault] - 1]


@pytest.fixture(scope="module")
def day(slurm, project, submit, recoveries, timed_job) -> Day:
    """One job on two nodes: a drained node, a signal, a kill, a hang, a dead node."""
    run_dir = project.folder / "out/runs/hard-day"
    job_id = submit(
        "--nodes=2", "--exclude=node4", "--ntasks-per-node=1", *ON_CPUS, "slurm/train.sbatch", *RUN,
        f"run.dir={run_dir}", "guards.stall_s=20",
    )  # fmt: skip
    watched = Watched(run_dir, project, job_id, slurm)
    faults: dict[str, int] = {}
    life, _ = watched.wait_for_steps(4)

    def recover(fault: str, do: Callable[[], None]) -> None:
        nonlocal life
        faults[fault] = life
        since = time.monotonic()
        do()
        life, first = watched.wait_for_steps(4, after_life=life)
        recoveries[fault] = round(first - since, 1)

    drained = watched.lives()[-1].nodes[0]
    slurm.mark(drained, "DRAIN")
    steps = len(watched.steps())
    watched.until(lambda: len(watched.steps()) > steps + 2)
    recover(SIGNAL, lambda: slurm.command("scancel", "--signal=USR1", job_id))
    slurm.resume(drained)
    recover(KILL, lambda: send(signal.SIGKILL, slurm.pids(job_id, rank=1)))
    recover(HANG, lambda: send(signal.SIGSTOP, slurm.pids(job_id, rank=1)))
    dead = watched.lives()[-1].nodes[1]
    recover(DOWN, lambda: slurm.mark(dead, "DOWN"))
    slurm.resume(dead)
    job = slurm.wait(job_id, *FINISHED, timeout_s=240)
    return Day(watched, job, project.log(job_id), faults)


def send(number: signal.Signals, pids: list[int]) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, number)


def test_a_job_comes_back_after_every_fault_and_finishes(day):
    assert (day.job["JobState"], day.job["ExitCode"]) == ("COMPLETED", "0:0"), day.log
    assert int(day.job["Restarts"]) == len(day.lives) - 1 >= 4
    assert [life.restart_count for life in day.lives] == list(range(len(day.lives)))
    assert day.met(SIGNAL).reason == "SIGUSR1"
    # rank 0 has heard of its peer's end, or was ended with it
    assert day.met(KILL).reason in ("RuntimeError", "unknown")
    assert day.met(HANG).reason == "stalled"
    assert day.met(DOWN).reason in ("RuntimeError", "SIGTERM", "unknown")
    assert day.lives[-1].reason == "finished"
    assert [life.ranks for life in day.lives] == [2] * len(day.lives)
    assert day.watched.steps() == list(range(1, STEPS + 1))


def test_record_weights_and_moments_are_those_of_an_undisturbed_run(day, project):
    name = "undisturbed"
    output = project.folder / "said" / name
    processes = start_commands(
        2, ["train", *RUN, f"run.name={name}"], cwd=project.folder, output=output
    )
    try:
        for process in processes:
            process.join(180)
        assert [process.exitcode for process in processes] == [0] * 2, (
            output / "0.txt"
        ).read_text()
    finally:
        for process in processes:
            process.kill()
    check_same(day.watched.run_dir, project.folder / "out/runs" / name)


def test_a_drained_node_keeps_its_job_and_gets_no_other(day):
    drained = day.met(SIGNAL)
    assert drained.last_step >= 6
    assert drained.nodes[0] not in day.met(KILL).nodes
    assert len(day.met(KILL).nodes) == 2


def test_a_node_that_goes_down_is_slurm_s_matter_and_not_the_script_s(day):
    restart = day.met(DOWN).restart_count
    assert f"restart {restart}: starts 2 ranks" in day.log
    said = [line for line in day.log.splitlines() if f"restart {restart}: " in line]
    assert not any("queues again" in line or "no progress" in line for line in said)


def test_a_rank_that_hangs_is_named(day):
    said = (day.watched.run_dir / "stalls.jsonl").read_text()
    assert "1 of 2 ranks are silent" in said
    assert "rank 1 on " in said
    assert "a rank stood still, see stalls.jsonl in the run folder; queues again" in day.log


def test_goodput_counts_no_time_between_lives(day):
    shares = [life.goodput for life in day.lives if life.goodput is not None]
    assert 0 < shares[-1] < 1
    counted_s = shares[-1] * (day.lives[-1].ended_s - day.lives[0].began_s)
    longest_s = sum(life.ended_s - life.began_s for life in day.lives if life.ended_s)
    assert counted_s < longest_s


@pytest.fixture(scope="module")
def lost(slurm, project, submit, recoveries) -> Day:
    """A job over four nodes, one of which loses contact while its tasks live on."""
    run_dir = project.folder / "out/runs/lost-node"
    job_id = submit(
        "--nodes=2-4", *ON_CPUS, "--export=ALL,PRETRAIN_TASKS_PER_NODE=1", "slurm/elastic.sbatch",
        *RUN, f"run.dir={run_dir}",
    )  # fmt: skip
    watched = Watched(run_dir, project, job_id, slurm)
    life, _ = watched.wait_for_steps(4)
    node = watched.lives()[-1].nodes[0]
    orphans = slurm.pids(job_id, rank=0)
    slurm.lose_node(node)
    started = time.monotonic()
    send(signal.SIGSTOP, orphans)
    _, first = watched.wait_for_steps(4, after_life=life)
    recoveries[LOST] = round(first - started, 1)
    before = {
        path: path.read_bytes()
        for path in (run_dir / "lineage.jsonl", run_dir / "lock.json")
    }  # fmt: skip
    send(signal.SIGCONT, orphans)
    watched.until(lambda: not any(is_alive(pid) for pid in orphans), timeout_s=60)
    for path, content in before.items():
        assert path.read_bytes() == content, f"the orphan wrote {path.name}"
    job = slurm.wait(job_id, *FINISHED, timeout_s=240)
    slurm.start_node(node)
    watched.until(lambda: node in slurm.idle_nodes(), timeout_s=60)
    return Day(watched, job, project.log(job_id), {LOST: life})


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def test_a_job_goes_on_without_the_node_that_was_lost(lost):
    assert lost.job["JobState"] == "COMPLETED", lost.log
    before, after = lost.met(LOST), lost.lives[-1]
    assert (before.ranks, after.ranks) == (4, 3)
    assert set(after.nodes) == set(before.nodes[1:])
    assert after.reason == "finished"


def test_fewer_ranks_read_the_same_rows(lost, day):
    rows, checksums = ("data/first_row", "data/checksum")
    assert lost.watched.steps() == list(range(1, STEPS + 1))
    mine, other = read_steps(lost.watched.run_dir), read_steps(day.watched.run_dir)
    for key in (rows, checksums):
        at = STEADY.index(key)
        assert [mine[step][at] for step in mine] == [other[step][at] for step in other]


def test_orphans_write_no_word_about_the_run(lost):
    """Neither the orphaned rank 0 nor the orphaned batch script, which outlives its node too."""
    assert lost.met(LOST).reason == "unknown"
    assert int(lost.job["Restarts"]) == len(lost.lives) - 1
    assert "SIGUSR1" not in [life.reason for life in lost.lives]
