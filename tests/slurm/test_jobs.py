"""The scripts in slurm/ on a real, private SLURM, with the real program."""

import json
import shutil
import sys
import time

import pytest
import yaml
from lives import check_same
from private_slurm import ROOT
from watching import FINISHED, Watched

from conftest import SMALL
from pretrain.loop.metrics import read_metrics
from pretrain.testing import start_commands

pytestmark = pytest.mark.slurm

ON_CPUS = ("--gpus-per-node=0", "--cpus-per-task=1")
CPU_NODES = ("--nodes=2", "--ntasks-per-node=1", *ON_CPUS)


def test_a_job_that_is_told_to_stop_saves_queues_again_and_ends_as_if_it_had_not_been(
    slurm, project, submit
):
    run_dir = project.folder / "out/runs/stopped"
    arguments = [*SMALL, "run.steps=40", "run.name=with a blank"]
    job_id = submit(
        "--nodes=2", "--ntasks-per-node=2", *ON_CPUS, "slurm/train.sbatch", *arguments,
        f"run.dir={run_dir}", "logging.tags=[two words, '$HOME;*']",
    )  # fmt: skip
    watched = Watched(run_dir, project, job_id, slurm)
    watched.wait_for_steps(3)
    slurm.command("scancel", "--signal=USR1", job_id)
    job = slurm.wait(job_id, "PENDING", *FINISHED)
    assert job["JobState"] == "PENDING", project.log(job_id)
    requeue = json.loads((run_dir / "requeue.json").read_text())
    assert (requeue["job_id"], requeue["restart_count"]) == (job_id, 0)
    step = requeue["step"]
    assert 3 <= step < 40
    job = slurm.wait(job_id, *FINISHED, timeout_s=240)
    log = project.log(job_id)
    assert (job["ExitCode"], job["Restarts"]) == ("0:0", "1"), log
    assert f"restart 0: saved step {step} on a signal; queues again at step {step}" in log
    frozen = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert frozen["run"]["name"] == "with a blank"
    assert frozen["logging"]["tags"] == ["two words", "$HOME;*"]
    assert not (run_dir / "requeue.json").exists()
    first, second = watched.lives()
    assert (first.nodes, first.ranks, first.last_step) == (["node1", "node2"], 4, step)
    assert (first.reason, second.reason) == ("SIGUSR1", "finished")
    assert (second.first_step, second.last_step) == (step, 40)
    check_same(run_dir, undisturbed(project, arguments))


def undisturbed(project, arguments):
    """The same run on four ranks, without SLURM and without a stop."""
    run_dir, output = project.folder / "out/runs/not-stopped", project.folder / "said"
    processes = start_commands(
        4, ["train", *arguments, f"run.dir={run_dir}"], cwd=project.folder, output=output
    )
    try:
        for process in processes:
            process.join(240)
        codes = [process.exitcode for process in processes]
        assert codes == [0] * 4, (output / "0.txt").read_text()
    finally:
        for process in processes:
            process.kill()
    return run_dir


@pytest.fixture(scope="module")
def smoke_job(slurm, project, submit):
    """The smoke job, which builds text and shards of its own, and an evaluation behind it."""
    overrides = [*SMALL, "data.name=smoke"]
    job_id = submit("--gpus-per-node=0", "slurm/smoke.sbatch", *overrides)
    behind = submit(
        "--gpus-per-node=0", f"--dependency=afterok:{job_id}", "slurm/eval.sbatch",
        f"run.dir=out/runs/smoke-{job_id}", "evaluate.depths=[2,3]",
    )  # fmt: skip
    never = submit(
        "--gpus-per-node=0", f"--dependency=afternotok:{job_id}", "slurm/eval.sbatch", "run.dir=no"
    )
    assert slurm.job(behind)["JobState"] == "PENDING"
    job = slurm.wait(job_id, *FINISHED, timeout_s=300)
    assert job["ExitCode"] == "0:0", project.log(job_id)
    return job_id, behind, never


@pytest.mark.slow
def test_smoke_goes_from_text_to_held_out_loss_on_two_nodes(smoke_job, project):
    run_dir = project.folder / f"out/runs/smoke-{smoke_job[0]}"
    steps = [record for record in read_metrics(run_dir / "metrics.jsonl") if "loss/nats" in record]
    assert [record["step"] for record in steps] == list(range(1, 7))
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == [
        "rank-00000.log",
        "rank-00001.log",
    ]
    (evaluation,) = (run_dir / "evaluation").glob("*.json")
    assert json.loads(evaluation.read_text())["step"] == 6
    assert "These 2 ranks can train" in project.log(smoke_job[0])


@pytest.mark.slow
def test_an_evaluation_waits_for_its_training_or_is_dropped(smoke_job, slurm, project):
    smoke, behind, never = smoke_job
    job = slurm.wait(behind, *FINISHED, timeout_s=120)
    assert job["ExitCode"] == "0:0", project.log(behind)
    path = project.folder / f"out/runs/smoke-{smoke}/evaluation/step-0000000006.json"
    # the smoke job had measured other depths
    assert json.loads(path.read_text())["validation/depths"] == [2, 3]
    assert slurm.wait(never, *FINISHED)["JobState"] == "CANCELLED"


@pytest.mark.slow
def test_a_folder_has_one_job_and_a_cancelled_job_saves_and_does_not_come_back(
    slurm, project, submit
):
    run_dir = project.folder / "out/runs/cancelled"
    arguments = ("slurm/train.sbatch", *SMALL, f"run.dir={run_dir}", "run.steps=9999")
    job_id = submit(*CPU_NODES, *arguments)
    watched = Watched(run_dir, project, job_id, slurm)
    watched.wait_for_steps(3)
    second = submit("--nodes=1", *CPU_NODES[1:], *arguments)
    job = slurm.wait(second, *FINISHED, timeout_s=120)
    assert (job["ExitCode"], job["Restarts"]) == ("64:0", "0"), project.log(second)
    assert f"SLURM job {job_id} restart 0" in project.log(second)
    assert "which another life would repeat" in project.log(second)
    slurm.command("scancel", job_id)
    deadline = time.monotonic() + 60
    while slurm.command("squeue", "--noheader", "--jobs", job_id):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job = slurm.job(job_id)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert "queues again" not in project.log(job_id)
    assert (run_dir / "checkpoints/latest").exists(), project.log(job_id)
    assert [life.reason for life in watched.lives()] == ["SIGTERM"]


@pytest.mark.slow
def test_a_mistake_in_the_arguments_fails_the_job_and_is_named(slurm, project, submit):
    job_id = submit(*CPU_NODES, "slurm/train.sbatch", "model.widht=32")
    job = slurm.wait(job_id, *FINISHED, timeout_s=120)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "64:0", "0")
    assert "widht" in project.log(job_id)


# The second node of the first life was left behind by an update of the code.
ONE_NODE_IS_BEHIND = """#!/bin/sh
[ "$SLURM_NODEID:${SLURM_RESTART_COUNT:-0}" != 1:0 ] || export PYTHONPATH='THERE:THERE/kernels'
exec 'INTERPRETER' "$@"
"""


@pytest.mark.slow
def test_a_node_that_is_not_like_the_others_is_left_out_before_the_ranks_start(
    slurm, project, submit, monkeypatch, tmp_path
):
    for name in ("conf", "kernels/pretrain_kernels", "pretrain"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    (tmp_path / "pretrain/renamed_since.py").touch()
    python = tmp_path / "python"
    text = ONE_NODE_IS_BEHIND.replace("THERE", str(tmp_path))
    text = text.replace("INTERPRETER", sys.executable)
    python.write_text(text)
    python.chmod(0o755)
    monkeypatch.setenv("PRETRAIN_PYTHON", str(python))
    monkeypatch.setenv("PRETRAIN_PREFLIGHT", "1")
    run_dir = project.folder / "out/runs/checked"
    job_id = submit(*CPU_NODES, "slurm/train.sbatch", *SMALL, f"run.dir={run_dir}")
    job = slurm.wait(job_id, *FINISHED, timeout_s=300)
    log = project.log(job_id)
    assert (job["ExitCode"], job["Restarts"]) == ("0:0", "1"), log
    (logs,) = (project.folder / "slurm/logs").glob(f"*-{job_id}")
    first, second = (
        {path.stem: json.loads(path.read_text()) for path in (logs / folder).glob("*.json")}
        for folder in ("preflight-0", "preflight-1")
    )
    (good, behind) = sorted(first)
    assert (first[good]["ok"], first[behind]["ok"]) == (True, False), log
    found = [finding for finding in first[behind]["findings"] if finding["status"] == "missing"]
    assert [finding["subject"] for finding in found] == ["beside others: code"]
    assert f"queues again without {behind}" in log
    assert job["ExcNodeList"] == behind
    assert [said["ok"] for said in second.values()] == [True, True]
    (life,) = Watched(run_dir, project, job_id, slurm).lives()
    assert (life.nodes, life.reason) == (sorted(second), "finished")
    assert behind not in life.nodes


@pytest.mark.slow
def test_shards_that_no_node_can_read_end_the_job_and_cost_no_node(
    slurm, project, submit, monkeypatch
):
    monkeypatch.setenv("PRETRAIN_PREFLIGHT", "1")
    job_id = submit(*CPU_NODES, "slurm/train.sbatch", *SMALL, "data.shards=nowhere")
    job = slurm.wait(job_id, *FINISHED, timeout_s=120)
    log = project.log(job_id)
    assert (job["ExitCode"], job["Restarts"]) == ("65:0", "0"), log
    said = log.partition("so the fault is the job's and none is left out:")[2]
    assert said.startswith("\n    shards: "), log
    assert "nowhere" in said.splitlines()[1]


@pytest.mark.slow
def test_an_array_of_jobs_builds_the_shards_of_one_build(slurm, project, submit, workspace):
    """Each source is cut into files, as large corpora are, and built in both ways."""
    for source in ("prose", "sums"):
        lines = (workspace / "text" / source / "part.jsonl").read_text().splitlines(keepends=True)
        folder = project.folder / "cut" / source
        folder.mkdir(parents=True)
        for part in range(5):
            (folder / f"{part}.jsonl").write_text("".join(lines[part::5]))
    overrides = [*SMALL, "data.root=cut"]
    one = submit("--cpus-per-task=1", "slurm/data.sbatch", *overrides, "data.name=by-one")
    many = submit(
        "--cpus-per-task=1", "--array=3-5", "slurm/data.sbatch", *overrides, "data.name=by-many"
    )
    last = submit(
        "--cpus-per-task=1", f"--dependency=afterok:{many}", "slurm/data.sbatch", *overrides,
        "data.name=by-many",
    )  # fmt: skip
    for job_id in (one, last):
        job = slurm.wait(job_id, *FINISHED, timeout_s=240)
        assert job["ExitCode"] == "0:0", project.log(job_id)
    assert "10 of 10 parts were tokenized before" in project.log(last)
    shares = "".join(path.read_text() for path in (project.folder / "slurm/logs").glob("*data*"))
    for task, parts in ((0, 4), (1, 3), (2, 3)):
        assert f"job {task} of 3: {parts} of 10 parts are there" in shares
    trees = []
    for name in ("by-one", "by-many"):
        (folder,) = (project.folder / "out/data").glob(f"{name}-*")
        files = [path for path in folder.rglob("*") if path.is_file()]
        trees.append({str(path.relative_to(folder)): path.read_bytes() for path in files})
    assert trees[0] == trees[1]
    assert "prose/train-000000.tar" in trees[0]
    assert "manifest.json" in trees[0]
