"""What sbatch gets from us; what real ones make of it is in tests/slurm."""

from pathlib import Path

import pytest

from pretrain.jobs.queue import sbatch

# Of an interactive step; SLURM 22.05 hands all of it on to a job that is submitted there.
OF_A_STEP = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_ID": "0",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x3",
    "SLURM_MEM_PER_NODE": "8192",
    "SLURM_GPUS_ON_NODE": "1",
    "SLURM_RESTART_COUNT": "2",
    "SLURMD_NODENAME": "node7",
    "SRUN_DEBUG": "3",
}
FOR_SBATCH = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "token", "SBATCH_ACCOUNT": "mine"}
OF_A_SITE = FOR_SBATCH | {"SLURM_CPU_BIND": "none"}


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a program in sbatch's place."""
    program = tmp_path / "bin/sbatch"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nenv >{tmp_path}/seen\necho '4242;here'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    for name in OF_A_STEP:
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "seen"


def read(path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)


def test_a_job_inherits_nothing_of_the_one_it_is_submitted_in(
    seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (OF_A_SITE | OF_A_STEP).items():
        monkeypatch.setenv(name, value)
    assert sbatch(tmp_path / "job.sbatch", None) == "4242"
    inherited = read(seen)
    assert not inherited.keys() & OF_A_STEP.keys()
    assert FOR_SBATCH.items() <= inherited.items()


def test_outside_of_jobs_a_site_s_settings_are_inherited(
    seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in OF_A_SITE.items():
        monkeypatch.setenv(name, value)
    sbatch(tmp_path / "job.sbatch", None)
    assert OF_A_SITE.items() <= read(seen).items()
