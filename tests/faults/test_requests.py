"""Whoever may write into the run folder may ask a run to wait, to save or to stop."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lives import STEPS, Life, check_same, finish, read_steps, row

from pretrain.engine import commit
from pretrain.errors import EXIT_SAVED_ON_SIGNAL
from pretrain.loop.lineage import read_lives

pytestmark = pytest.mark.faults


@row(
    "control/save and control/pause at once",
    "the save is committed, and its file removed, before the run waits",
)
def test_a_save_is_committed_before_the_run_pauses(workspace: Path) -> None:
    """Whoever asks for both waits for the save; and a pause may be long, and end in a power cut."""
    folder = workspace / "out/runs/asked-for-both/control"
    folder.mkdir(parents=True)
    for name in ("save", "pause"):
        (folder / name).touch()
    with Life(workspace, "asked-for-both", "checkpoint.every_steps=1000") as life:
        life.until(lambda: "paused: remove" in life.said(0))
        paused_at = max(read_steps(life.run_dir))
        assert [commit.step_of(saved) for saved in commit.committed(life.run_dir)] == [paused_at]
        assert [path.name for path in folder.iterdir()] == ["pause"]


@row(
    "control/pause for longer than the watchdog's limit, control/save, control/stop",
    "waits, heartbeats go on; saves, removes the file; saves, exits 75, asks for no requeue",
)
def test_a_run_pauses_saves_and_stops_as_files_ask(
    workspace: Path, whole: Callable[[int], Path]
) -> None:
    rare = ("checkpoint.every_steps=1000", "guards.stall_s=4")
    with Life(workspace, "asked", *rare, ranks=2) as life:
        folder = life.run_dir / "control"
        life.until(folder.is_dir)
        (folder / "pause").touch()
        life.until(lambda: "paused: remove" in life.said(0))
        paused_at = max(read_steps(life.run_dir))
        beat = (life.run_dir / "lock.json").stat().st_mtime_ns
        # longer than the watchdog's patience, by its own measure
        time.sleep(6)
        assert max(read_steps(life.run_dir)) == paused_at
        assert (life.run_dir / "lock.json").stat().st_mtime_ns > beat
        assert not (life.run_dir / "stalls.jsonl").exists()
        (folder / "save").touch()
        (folder / "pause").unlink()
        life.until(lambda: not (folder / "save").exists())
        (saved,) = commit.committed(life.run_dir)
        assert commit.find_damage(saved) == ""
        (folder / "stop").touch()
        assert life.wait() == [EXIT_SAVED_ON_SIGNAL] * 2, life.said()
    assert life.said(0).count("paused: remove") == 1
    stopped_at = max(read_steps(life.run_dir))
    assert paused_at < stopped_at < STEPS
    assert not (life.run_dir / "requeue.json").exists()
    # what was asked for stays asked for
    with Life(workspace, "asked", *rare, ranks=2) as life:
        assert life.wait() == [EXIT_SAVED_ON_SIGNAL] * 2, life.said()
        assert f"stays at step {stopped_at}: control/stop is there" in life.said(0)
    (folder / "stop").unlink()
    run_dir = finish(workspace, "asked", ranks=2)
    lives = read_lives(run_dir)
    assert [(life.first_step, life.last_step, life.reason) for life in lives] == [
        (0, stopped_at, "stop"),
        (stopped_at, STEPS, "finished"),
    ]
    assert lives[0].ranks == 2
    assert 0 < lives[1].goodput < 1
    check_same(run_dir, whole(2))
