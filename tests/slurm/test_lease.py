"""A run folder whose holder is gone, in the eyes of a job on another host."""

import json
import shutil
import time
from pathlib import Path

import pytest
from private_slurm import Slurm

from pretrain.errors import ConfigError
from pretrain.jobs.queue import has_ended, queued
from pretrain.loop.lock import RunLock

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SLEEP = ("--nodes=1", "--ntasks=1", "--output=/dev/null", "--wrap", "sleep 600")


def hold(run_dir: Path) -> None:
    """Leave the lock of a process of this job, on a host that is not this one."""
    RunLock(run_dir, has_ended=has_ended).__enter__()
    path = run_dir / "lock.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "elsewhere"}))


def wait_until_forgotten(slurm: Slurm, job_id: str) -> None:
    deadline = time.monotonic() + 60
    while job_id in slurm.command("squeue", "--noheader", "--format=%A").split():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_next_job_gets_the_folder_of_one_that_was_killed_and_of_no_other(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a chain, when a job's time is up before it has saved."""
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "test")
    first, second = (slurm.submit(*SLEEP, cwd=tmp_path) for _ in range(2))
    monkeypatch.setenv("SLURM_JOB_ID", first)
    hold(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", second)
    with pytest.raises(ConfigError, match="in use"), RunLock(tmp_path, has_ended=has_ended):
        pass
    slurm.command("scancel", "--signal=KILL", "--full", first)
    wait_until_forgotten(slurm, first)
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "another")
    with pytest.raises(ConfigError, match="in use"), RunLock(tmp_path, has_ended=has_ended):
        pass
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "test")
    with RunLock(tmp_path, has_ended=has_ended) as lock:
        lock.refresh()
    assert f"taken over: SLURM job {first} has ended" in caplog.text
    slurm.command("scancel", second)


@pytest.mark.parametrize("shown", [{}, {"SQUEUE_STATES": "PENDING"}])
def test_a_job_that_squeue_does_not_show_by_itself_has_not_ended(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: dict[str, str]
) -> None:
    """In a hidden partition, say: its own user, who is seldom root, has to ask for all."""
    for name, value in shown.items():
        monkeypatch.setenv(name, value)
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\nexec runuser -u nobody -- {shutil.which("squeue")} "$@"\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    partition = "PartitionName=hidden"
    slurm.command("scontrol", "create", partition, "Nodes=ALL", "Hidden=YES", "State=UP")
    job = slurm.submit("--partition=hidden", "--uid=nobody", "--chdir=/", *SLEEP)
    try:
        slurm.wait(job, "RUNNING")
        assert not has_ended(job)
        assert [each.job_id for each in queued() or []] == [job]
    finally:
        slurm.command("scancel", job)
        slurm.wait(job, "CANCELLED")
        slurm.command("scontrol", "delete", partition)
    assert has_ended(job)
