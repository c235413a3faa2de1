"""Signals and kills at chosen moments."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lives import SETTING, STEPS, Life, check_same, finish, read_steps, row

pytestmark = pytest.mark.faults


@row(
    "SIGTERM to one rank of three",
    "all save the same step, exit 75, leave requeue.json",
)
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    workspace: Path, whole: Callable[[int], Path]
) -> None:
    name = "one-signalled"
    with Life(workspace, name, ranks=3) as life:
        life.until(lambda: life.has_step(4))
        life.processes[2].terminate()
        assert life.wait() == [75] * 3
    last = max(read_steps(life.run_dir))
    assert (life.run_dir / "checkpoints/latest").read_text().strip() == f"step-{last:010d}"
    assert f'"step": {last}' in (life.run_dir / "requeue.json").read_text()
    check_same(finish(workspace, name, ranks=3), whole(3))


def validating(run_dir: Path) -> bool:
    """Whether a step is recorded and its validation, every third step, is not; not the last one."""
    due = sum(step % 3 == 0 for step in read_steps(run_dir) if step < STEPS)
    path = run_dir / "metrics.jsonl"
    return due > (path.read_text().count('"validation/depths"') if path.exists() else 0)


MOMENTS = {
    "save": (lambda d: any((d / "checkpoints").glob("step-*.tmp-*")), ["checkpoint.every_steps=1"]),
    "validation": (validating, ["validation.depths=[1,300]"]),
}


@pytest.mark.parametrize("moment", MOMENTS)
@row(
    "SIGTERM during a save, and during a validation",
    "the save is committed or made again, the validation ends; exit 75",
)
def test_a_signal_while_busy_is_obeyed_at_the_step_boundary(
    workspace: Path, whole: Callable[[int], Path], moment: str
) -> None:
    condition, overrides = MOMENTS[moment]
    name = f"signal-in-{moment}"
    with Life(workspace, name, *overrides, ranks=2) as life:
        life.until(lambda: condition(life.run_dir))
        for process in life.processes:
            process.terminate()
        assert life.wait() == [75] * 2
    check_same(finish(workspace, name, ranks=2), whole(2))


def stands_still(run_dir: Path) -> bool:
    """Whether no step is taken for longer than any takes: what was read ahead is used up."""
    before = max(read_steps(run_dir))
    time.sleep(1.5)
    return max(read_steps(run_dir)) == before


@row("SIGTERM while a rank waits for data", "obeyed when the data comes; exit 75")
def test_a_signal_while_waiting_for_data(workspace: Path, whole: Callable[[int], Path]) -> None:
    name = "signal-in-wait"
    with Life(workspace, name, "data.loader_workers=1") as life:
        life.until(lambda: life.has_step(4))
        pid = life.processes[0].pid
        (reader,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        os.kill(int(reader), signal.SIGSTOP)
        life.until(lambda: stands_still(life.run_dir))
        life.processes[0].terminate()
        time.sleep(0.3)
        assert life.processes[0].is_alive()
        os.kill(int(reader), signal.SIGCONT)
        assert life.wait() == [75]
    check_same(finish(workspace, name), whole(1))


@row("SIGTERM in the first seconds of a life", "it ends at once (-15) or saves and exits 75")
def test_a_signal_during_the_start(workspace: Path, whole: Callable[[int], Path]) -> None:
    name = "signal-at-start"
    for after_s in (0.02, 0.1, 0.3, 0.6, 1.0):
        with Life(workspace, name) as life:
            time.sleep(after_s)
            life.processes[0].terminate()
            assert life.wait()[0] in (-signal.SIGTERM, 75)
    check_same(finish(workspace, name), whole(1))


@row("SIGUSR1 while a life still imports torch", "kept until training listens; saves, exits 75")
def test_a_time_limit_that_nears_during_the_start(
    workspace: Path, whole: Callable[[int], Path]
) -> None:
    name = "limit-at-start"
    launcher = Path(__file__).parents[2] / "launch/node.sh"
    command = ["bash", str(launcher), "train", *SETTING, f"run.name={name}"]
    place = {"PRETRAIN_PYTHON": sys.executable, "PRETRAIN_WORKDIR": str(workspace)}
    environment = os.environ | place | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment) as process:
        try:
            deadline = time.monotonic() + 240
            while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGUSR1)
            assert process.wait(timeout=240) == 75
        finally:
            process.kill()
    check_same(finish(workspace, name), whole(1))


@pytest.mark.parametrize("victim", [0, 2])
@row("kill -9 of one rank of three in mid-step", "the others end within seconds, not with 0")
def test_a_killed_rank_ends_the_others(
    workspace: Path, whole: Callable[[int], Path], victim: int
) -> None:
    name = f"rank-{victim}-killed"
    with Life(workspace, name, ranks=3) as life:
        life.until(lambda: life.has_step(5))
        life.processes[victim].kill()
        started = time.monotonic()
        codes = life.wait()
        # far below the half hour after which a collective gives up
        assert time.monotonic() - started < 60
        assert codes[victim] == -signal.SIGKILL
        assert 0 not in codes
    check_same(finish(workspace, name, ranks=3), whole(3))


@row(
    "a life is stopped (SIGSTOP), another takes its folder over, the first is continued",
    "the orphan writes nothing but its log and ends with 65",
    "the orphan's steps, which the other life has taken",
)
def test_an_orphan_that_comes_back_writes_nothing(
    workspace: Path, whole: Callable[[int], Path]
) -> None:
    name = "orphan"
    with Life(workspace, name, "checkpoint.every_steps=1") as orphan:
        orphan.until(lambda: orphan.has_step(6))
        os.kill(orphan.processes[0].pid, signal.SIGSTOP)
        # as a lease looks that nobody has refreshed for an hour
        lock = orphan.run_dir / "lock.json"
        os.utime(lock, (time.time() - 3600, time.time() - 3600))
        run_dir = finish(workspace, name, "checkpoint.every_steps=1")
        before = {
            p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file() and "logs" not in str(p)
        }
        os.kill(orphan.processes[0].pid, signal.SIGCONT)
        assert orphan.wait() == [65]
        assert "now belongs to" in orphan.said()
        after = {
            p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file() and "logs" not in str(p)
        }
        assert after == before
    check_same(run_dir, whole(1))


@row("a second job starts on a folder that is in use", "refused with the holder's name; exit 64")
def test_two_live_jobs_do_not_share_a_folder(workspace: Path, whole: Callable[[int], Path]) -> None:
    name = "contested"
    with Life(workspace, name) as first:
        first.until(lambda: first.has_step(2))
        # so that it cannot have ended before the second one looks
        (first.run_dir / "control/pause").touch()
        with Life(workspace, name) as second:
            assert second.wait() == [64]
            assert f"is in use by process {first.processes[0].pid}" in second.said()
        (first.run_dir / "control/pause").unlink()
        assert first.wait() == [0]
    check_same(first.run_dir, whole(1))


def jump_clocks() -> None:
    """Shift the wall clock of this process by an hour, forth and back, every tenth of a second."""
    real, started = time.time, time.monotonic()

    def shifted() -> float:
        return real() + (3600 if int((time.monotonic() - started) * 10) % 2 else -3600)

    time.time = shifted


@row(
    "the clock of the processes (time.time) jumps by an hour, forth and back",
    "nobody notices: ages and waits are monotonic, heartbeats are the file system's",
)
def test_clock_steps_change_nothing(workspace: Path, whole: Callable[[int], Path]) -> None:
    name = "clocks"
    with Life(workspace, name, "guards.stall_s=5", ranks=2, before=jump_clocks) as life:
        life.until(lambda: life.has_step(4))
        for process in life.processes:
            process.terminate()
        assert life.wait() == [75] * 2
    run_dir = finish(workspace, name, ranks=2, before=jump_clocks)
    assert not (run_dir / "stalls.jsonl").exists()
    check_same(run_dir, whole(2))
