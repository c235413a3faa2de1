"""Nodes with addresses of their own: ranks find each other by what SLURM says inside the job."""

import shutil
from pathlib import Path

import pytest
from watching import FINISHED, Watched, job_environment

from conftest import SMALL

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture
def bare_container(tmp_path: Path) -> Path:
    """Words like those of a container: another folder to begin in, and no program of SLURM's."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "dirname", "nproc", "uname"):
        program = shutil.which(name)
        assert program is not None
        (tmp_path / "bin" / name).symlink_to(program)
    path = tmp_path / "container.sh"
    path.write_text(f"container=(env --chdir=/ PATH={tmp_path}/bin)\n")
    return path


def test_ranks_in_containers_on_two_hosts_meet_by_the_name_of_the_first(
    separate_slurm, project, bare_container, monkeypatch
):
    monkeypatch.setenv("PRETRAIN_CONTAINER", str(bare_container))
    # as a site file says it; gloo would else take the address that the machine's name stands for
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    run_dir = project.folder / "out/runs/addresses"
    with job_environment():
        job_id = separate_slurm.submit(
            "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1",
            "--job-name=addresses", "slurm/train.sbatch", *SMALL, f"run.dir={run_dir}",
            cwd=project.folder,
        )  # fmt: skip
    watched = Watched(run_dir, project, job_id, separate_slurm)
    job = separate_slurm.wait(job_id, *FINISHED, timeout_s=240)
    assert job["ExitCode"] == "0:0", project.log(job_id)
    (life,) = watched.lives()
    assert (life.nodes, life.ranks, life.reason) == (["host1", "host2"], 2, "finished")
