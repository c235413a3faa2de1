"""A sweep is a list of runs; their folders and the queue say what became of each."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from conftest import SMALL, run_cli
from pretrain.compose import load, write_frozen
from pretrain.errors import CheckpointError, ConfigError
from pretrain.jobs import sweeps
from pretrain.jobs.progress import read_progress
from pretrain.jobs.queue import Queued
from pretrain.jobs.sweeps import (
    Point,
    State,
    check_sweep_folder,
    read_sweep,
    report,
    swept_values,
    write_sweep,
)
from pretrain.loop.metrics import MetricLog
from pretrain.loop.state import TrainState


def make_run(folder: Path, *, step: int = 0, steps: int = 6, held_out: float | None = None) -> Path:
    """A run's folder as its life leaves it after `step` steps."""
    write_frozen(load("train", [*SMALL, f"run.dir={folder}", f"run.steps={steps}"]), folder)
    if step:
        log = MetricLog(folder / "metrics.jsonl")
        log.write({"step": step, "loss/nats": 5.5})
        if held_out is not None:
            log.write({"step": step, "validation/loss_at_mean_nats": held_out})
        log.close()
        saved = folder / f"checkpoints/step-{step:010d}"
        saved.mkdir(parents=True)
        state = TrainState(step=step, tokens=step * 512)
        (saved / "state.json").write_text(json.dumps({"train": state.as_dict()}))
        # one in the making
        (folder / f"checkpoints/step-{step + 1:010d}.tmp-1").mkdir()
    return folder


def test_only_what_differs_between_runs_is_swept() -> None:
    jobs = [["a=1", "b=2", "c='x=y'"], ["a=1", "b=3", "c='x=z'"]]
    assert swept_values(jobs) == [{"b": "2", "c": "'x=y'"}, {"b": "3", "c": "'x=z'"}]
    assert swept_values([["a=1"]]) == [{}]


def test_a_sweep_is_read_as_it_was_written(tmp_path: Path) -> None:
    points = [Point(run_dir="/a b", swept={"k": "ü"}), Point(run_dir="/c", swept={"k": "2"})]
    write_sweep(tmp_path / "sweep", points)
    assert read_sweep(tmp_path / "sweep") == points
    with pytest.raises(ConfigError, match=r"has no sweep\.json"):
        read_sweep(tmp_path)
    check_sweep_folder(tmp_path / "sweep", points)
    check_sweep_folder(tmp_path, points[:1])
    with pytest.raises(ConfigError, match=r"lists 1 runs that are not among these, such as /c"):
        check_sweep_folder(tmp_path / "sweep", points[:-1])


def test_progress_is_that_of_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", step=4, steps=6, held_out=5.25)
    progress = read_progress(run)
    assert (progress.saved_step, progress.last_step, progress.is_finished) == (4, 6, False)
    assert (progress.step, progress.loss_nats, progress.held_out_nats) == (4, 5.5, 5.25)
    longer = load("train", [*SMALL, "run.steps=4"])
    assert read_progress(run, longer).is_finished
    # training passes over one that is damaged, too
    damaged = run / "checkpoints/step-0000000006/state.json"
    damaged.parent.mkdir()
    damaged.write_bytes(b"\0" * 9)
    assert read_progress(run).saved_step == 4
    shutil.rmtree(run / "checkpoints/step-0000000004")
    with pytest.raises(CheckpointError, match=r"step-0000000006/state\.json cannot be read"):
        read_progress(run)


@pytest.mark.parametrize(
    ("queue", "step", "state"),
    [
        ([], 6, State.finished),
        ([], 4, State.failed),
        ([], 0, State.failed),
        (None, 4, State.unknown),
        (None, 6, State.finished),
        (["PENDING"], 0, State.queued),
        (["RUNNING"], 2, State.running),
        (["PENDING", "RUNNING"], 2, State.running),
        (["COMPLETING"], 2, State.running),
    ],
    ids=str,
)
def test_queue_and_folder_tell_the_state(
    queue: list[str] | None,
    step: int,
    state: State,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run(tmp_path / "run", step=step)
    jobs = None
    if queue is not None:
        jobs = [Queued(job_id=str(n), state=s, workdir=str(run)) for n, s in enumerate(queue)]
        jobs.append(Queued(job_id="99", state="RUNNING", workdir="/elsewhere"))
    monkeypatch.setattr(sweeps, "queued", lambda: jobs)
    (line,) = report([Point(run_dir=str(run), swept={})])
    assert line.state is state
    assert line.job_ids == [str(number) for number in range(len(queue or []))]


def test_collect_sorts_by_held_out_loss_and_writes_a_table(tmp_path: Path) -> None:
    losses = {"high": 5.25, "none": None, "low": 4.75, "nan": float("nan")}
    points = [
        Point(
            run_dir=str(make_run(tmp_path / name, step=6, held_out=loss)), swept={"run.name": name}
        )
        for name, loss in losses.items()
    ]
    write_sweep(tmp_path / "sweep", points)
    done = run_cli(tmp_path, "sweep", "collect", "sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "sweep/sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run.name"] for row in rows] == ["low", "high", "none", "nan"]
    assert rows[0] | {"run": ""} == {
        "run.name": "low", "state": "finished", "job": "", "step": "6", "of": "6",
        "loss": "5.5000", "held out": "4.7500", "run": "",
    }  # fmt: skip
    done = run_cli(tmp_path, "sweep", "status", "sweep.dir=sweep")
    assert "4 finished" in done.stdout
    assert done.stdout.index("high") < done.stdout.index("low")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["run.seed=1,2"], "2 of 2 jobs would train in run.dir="),
        (["run.seed=1,x", "run.name=${run.seed}"], "run.seed"),
        (["cluster.nodes=1,3", "run.name=n${cluster.nodes}"], "batch.global_tokens"),
        (["run.seed=1,2", "run.name=s${run.seed}", "submit.to=host"], "train --multirun"),
        (["submit.chain=1,2", "run.name=c${submit.chain}"], "same submit"),
    ],
    ids=str,
)
def test_a_sweep_that_cannot_be_is_refused_before_its_first_job(
    overrides: list[str], said: str, tmp_path: Path
) -> None:
    done = run_cli(tmp_path, "submit", "-m", *overrides)
    assert done.returncode == 64
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_dry_sweep_shows_its_runs_and_one_script(tmp_path: Path) -> None:
    done = run_cli(
        tmp_path, "submit", "-m", "optimizer.learning_rate=1e-3,2e-3", "submit.dry_run=true",
        "run.name='lr-${optimizer.learning_rate}'",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rate in ("0.001", "0.002"):
        assert f"optimizer.learning_rate={rate}" in done.stdout
    assert done.stdout.count("#!/usr/bin/env bash") == 1
    assert not list(tmp_path.iterdir())
