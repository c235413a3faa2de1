"""`pretrain submit` into a real, private SLURM: jobs, chains and sweeps with the real program."""

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from lives import read_steps
from private_slurm import ROOT
from watching import FINISHED

from conftest import SMALL
from pretrain.jobs.queue import submissions

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

CPU = ["engine.device=cpu", "cluster.preflight=false", "cluster.cpus_per_gpu=1"]

Pretrain = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of one's own, to edit."""
    folder = tmp_path / "checkout"
    for name in ("conf", "kernels/pretrain_kernels", "launch", "pretrain", "slurm"):
        ignored = shutil.ignore_patterns("__pycache__", "*.log")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


@pytest.fixture
def pretrain(slurm, checkout: Path, workspace: Path) -> Pretrain:
    """The command, from that checkout, beside text and shards."""
    # the checkout's code, and nothing that other tests have said to their jobs
    environment = {k: v for k, v in slurm.environment.items() if not k.startswith("PRETRAIN_")}
    environment["PYTHONPATH"] = f"{checkout}{os.pathsep}{checkout / 'kernels'}"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pretrain", *words],
            cwd=workspace,
            env=environment,
            capture_output=True,
            text=True,
        )

    return run


def output(run_dir: Path) -> str:
    """Everything that a run's jobs and ranks have said."""
    files = [*run_dir.glob("slurm-*.log"), *run_dir.rglob("code/*/slurm/logs/*/*")]
    return "\n".join(f"[{path}]\n{path.read_text()}" for path in files if path.is_file())


def test_a_job_runs_from_its_snapshot_whatever_happens_to_the_checkout(
    slurm, pretrain: Pretrain, checkout: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / 'it\'s "all" of $HOME; `x` # & ü'
    spelled = str(run_dir).replace("'", "\\'")
    words = [
        *SMALL, *CPU, f"run.dir='{spelled}'", "cluster.nodes=2", "cluster.options=[--hold]",
        "+cluster.environment.NOTE='a $HOME; b'", "run.name=with a blank",
    ]  # fmt: skip
    done = pretrain("submit", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (submission,) = submissions(run_dir)
    job_id = submission.job_id
    assert f"submitted {job_id}\n" in done.stdout
    again = pretrain("submit", *words)
    assert again.returncode == 64
    assert f"has a job already: {job_id} is PENDING" in again.stderr
    (checkout / "pretrain/train.py").write_text("raise SystemExit(99)\n")
    (checkout / "launch/job.sh").unlink()
    slurm.command("scontrol", "release", job_id)
    job = slurm.wait(job_id, *FINISHED, timeout_s=180)
    assert job["ExitCode"] == "0:0", output(run_dir)
    assert list(read_steps(run_dir)) == [1, 2, 3, 4, 5, 6]
    assert (run_dir / f"slurm-{job_id}.log").is_file()
    assert {path.name for path in (run_dir / "logs").iterdir()} == {
        "rank-00000.log",
        "rank-00001.log",
    }


def test_a_chain_waits_in_line_and_its_rest_ends_at_once(
    slurm, pretrain: Pretrain, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    done = pretrain("submit", *SMALL, *CPU, f"run.dir={run_dir}", "submit.chain=3", "run.steps=2")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second, third = (submission.job_id for submission in submissions(run_dir))
    assert f"afterany:{first}" in slurm.job(second)["Dependency"]
    assert f"afterany:{second}" in slurm.job(third)["Dependency"]
    job = slurm.wait(third, *FINISHED, timeout_s=180)
    assert job["ExitCode"] == "0:0", output(run_dir)
    assert list(read_steps(run_dir)) == [1, 2]
    for later in (second, third):
        assert "has all its 2 steps" in (run_dir / f"slurm-{later}.log").read_text()
        assert not list(run_dir.rglob(f"slurm/logs/*-{later}"))
    done = pretrain("submit", f"run.dir={run_dir}")
    assert "has all its 2 steps" in done.stdout
    assert len(submissions(run_dir)) == 3


def test_a_sweep_is_submitted_at_once_watched_and_collected(
    slurm, pretrain: Pretrain, tmp_path: Path
) -> None:
    rates = ["1e-3", "2e-3", "4e-3", "0.5"]
    sweep = tmp_path / "sweep"
    # held, so that the command could not have waited for any of them
    done = pretrain(
        "submit", "--multirun", *SMALL, *CPU, f"optimizer.learning_rate={','.join(rates)}",
        f"run.dir='{tmp_path}/lr-${{optimizer.learning_rate}}'", f"submit.sweep_dir={sweep}",
        "run.steps=3", "cluster.options=[--hold]",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"4 runs in {sweep}" in done.stdout
    runs = [tmp_path / f"lr-{float(rate)}" for rate in rates]
    job_ids = [submissions(run)[0].job_id for run in runs]
    assert "4 queued" in pretrain("sweep", "status", f"sweep.dir={sweep}").stdout
    # one copy of the code for all
    assert len(list((sweep / "code").iterdir())) == 1
    slurm.command("scontrol", "release", ",".join(job_ids))
    for run, job_id in zip(runs, job_ids, strict=True):
        job = slurm.wait(job_id, *FINISHED, timeout_s=240)
        assert job["ExitCode"] == "0:0", output(run)
    assert "4 finished" in pretrain("sweep", "status", f"sweep.dir={sweep}").stdout
    done = pretrain("sweep", "collect", f"sweep.dir={sweep}")
    assert done.returncode == 0, done.stderr
    with (sweep / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {float(row["optimizer.learning_rate"]) for row in rows} == set(map(float, rates))
    losses = [float(row["held out"]) for row in rows]
    assert losses == sorted(losses)
    # a rate that is far too high
    assert rows[-1]["optimizer.learning_rate"] == "0.5"
    assert {(row["state"], row["step"], row["of"]) for row in rows} == {("finished", "3", "3")}
