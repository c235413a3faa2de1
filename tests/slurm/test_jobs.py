"""The scripts in slurm/ on a real, private SLURM of two nodes, with the real program."""

import json
import time
from pathlib import Path

import pytest
import yaml

from conftest import SMALL
from pretrain.loop.metrics import read_metrics

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
CPU_NODES = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


@pytest.fixture(scope="module")
def smoke_job(slurm, project, submit):
    """The smoke job, which also builds the shards that the other jobs read."""
    job_id = submit("--gpus-per-node=0", "slurm/smoke.sbatch", *SMALL)
    job = slurm.wait(job_id, *FINISHED, timeout_s=240)
    assert job["ExitCode"] == "0:0", project.log(job_id)
    return job_id


def test_smoke_goes_from_text_to_held_out_loss_on_two_nodes(smoke_job, project):
    run_dir = project.folder / f"out/runs/smoke-{smoke_job}"
    steps = [record for record in read_metrics(run_dir / "metrics.jsonl") if "loss/nats" in record]
    assert [record["step"] for record in steps] == list(range(1, 7))
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == [
        "rank-00000.log",
        "rank-00001.log",
    ]
    (evaluation,) = (run_dir / "evaluation").glob("*.json")
    assert json.loads(evaluation.read_text())["step"] == 6


def test_a_job_that_is_told_to_stop_saves_queues_again_and_finishes_with_its_arguments(
    smoke_job, slurm, project, submit
):
    run_dir = project.folder / "stopped"
    job_id = submit(
        *CPU_NODES,
        "slurm/train.sbatch",
        *SMALL,
        f"run.dir={run_dir}",
        "run.steps=60",
        "run.name=with a blank",
        "logging.tags=[two words, '$HOME;*']",
    )
    wait_for_steps(run_dir, 3, lambda: project.log(job_id))
    slurm.command("scancel", "--signal=USR1", job_id)
    job = slurm.wait(job_id, "PENDING", *FINISHED)
    assert job["JobState"] == "PENDING", project.log(job_id)
    requeue = json.loads((run_dir / "requeue.json").read_text())
    assert (requeue["job_id"], requeue["restart_count"]) == (job_id, 0)
    assert 3 <= requeue["step"] < 60
    job = slurm.wait(job_id, *FINISHED, timeout_s=120)
    log = project.log(job_id)
    assert (job["ExitCode"], job["Restarts"]) == ("0:0", "1"), log
    assert f"restart 0: saved step {requeue['step']} and queues again" in log
    assert f"resumed step-{requeue['step']:010d} at step {requeue['step']}" in log
    steps = [record for record in read_metrics(run_dir / "metrics.jsonl") if "loss/nats" in record]
    assert [record["step"] for record in steps] == list(range(1, 61))
    frozen = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert frozen["run"]["name"] == "with a blank"
    assert frozen["logging"]["tags"] == ["two words", "$HOME;*"]
    assert not (run_dir / "requeue.json").exists()
    assert not (run_dir / "lock.json").exists()


@pytest.mark.slow  # One more start of two ranks; the batch script's part in it is to do nothing.
def test_a_cancelled_job_saves_and_does_not_come_back(smoke_job, slurm, project, submit):
    run_dir = project.folder / "cancelled"
    job_id = submit(
        *CPU_NODES, "slurm/train.sbatch", *SMALL, f"run.dir={run_dir}", "run.steps=9999"
    )
    wait_for_steps(run_dir, 3, lambda: project.log(job_id))
    slurm.command("scancel", job_id)
    deadline = time.monotonic() + 30
    while slurm.command("squeue", "--noheader", "--jobs", job_id):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job = slurm.job(job_id)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert (run_dir / "checkpoints/latest").exists(), project.log(job_id)


def test_a_mistake_in_the_arguments_fails_the_job_and_is_named(slurm, project, submit):
    job_id = submit(*CPU_NODES, "slurm/train.sbatch", "model.widht=32")
    job = slurm.wait(job_id, *FINISHED, timeout_s=60)
    assert job["JobState"] == "FAILED"
    assert "widht" in project.log(job_id)


def wait_for_steps(run_dir, steps, describe, timeout_s=90):
    deadline = time.monotonic() + timeout_s
    record = run_dir / "metrics.jsonl"
    while not record.exists() or len(read_metrics(record)) < steps:
        assert time.monotonic() < deadline, describe()
        time.sleep(0.1)
