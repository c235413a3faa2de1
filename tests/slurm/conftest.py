"""A private SLURM, a project folder that jobs are submitted from, and what recoveries took.

With PRETRAIN_SLURM_TESTS=required a test that cannot run fails.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from network import two_hosts
from private_slurm import NEEDED, ROOT, Slurm, find_program, start_daemons
from watching import Project, Watched, job_environment

from conftest import SMALL

IS_REQUIRED = os.environ.get("PRETRAIN_SLURM_TESTS") == "required"
RECOVERIES = pytest.StashKey[dict[str, float]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECOVERIES] = {}


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if found := config.stash.get(RECOVERIES, {}):
        terminalreporter.section("from the fault to the first step of the next life, in seconds")
        terminalreporter.write_line(json.dumps(found, indent=1))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if IS_REQUIRED and report.skipped and item.get_closest_marker("slurm"):
        report.outcome = "failed"
        report.longrepr = f"SLURM tests are required here, but this one was skipped: {call.excinfo}"
    return report


@pytest.fixture(scope="session")
def recoveries(pytestconfig: pytest.Config) -> dict[str, float]:
    """Seconds from a fault to the first step of the next life, by what was done."""
    return pytestconfig.stash[RECOVERIES]


@pytest.fixture(scope="module")
def separate_slurm() -> Iterator[Slurm]:
    """A SLURM of two nodes with addresses of their own, and names that resolve only there."""
    check_slurm()
    with two_hosts() as places, running(**places) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A SLURM of idle nodes that share this host's address."""
    check_slurm()
    with running() as cluster:
        yield cluster


def check_slurm() -> None:
    """Skips where no SLURM can be started."""
    missing = [name for name in NEEDED if not find_program(name)]
    reason = f"not found: {', '.join(missing)}" if missing else ""
    if not missing and os.getuid() != 0:
        reason = "slurmd needs root to start tasks"
    if reason:
        pytest.skip(f"{reason}; on Debian: apt-get install slurm-wlm munge")


@contextmanager
def running(**places: Any) -> Iterator[Slurm]:
    """A SLURM that ends with the block, in a folder that goes with it."""
    # A socket's path has at most 107 characters, so not below pytest's folder.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    cluster = Slurm(folder, **places)
    try:
        start_daemons(cluster)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def project(tmp_path_factory, workspace):
    """The scripts as a user has them, raw text, tokenizer and shards."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("launch", "slurm"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.log"))
    shutil.copytree(workspace, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "out/runs", ignore_errors=True)
    return Project(folder)


@pytest.fixture(scope="session")
def submit(slurm, project):
    """Submits a script of the project."""
    with job_environment():
        yield lambda *words: slurm.submit(*words, cwd=project.folder)


@pytest.fixture(scope="session")
def timed_job(slurm, project, submit) -> Watched:
    """A job of two minutes that pauses at its first step until SLURM says that time is up.

    Whoever has something else to do meanwhile asks for it early.
    """
    run_dir = project.folder / "out/runs/timed"
    (run_dir / "control").mkdir(parents=True)
    (run_dir / "control/pause").touch()
    job_id = submit(
        "--time=2", "--signal=USR1@60", "--nodelist=node4", "--ntasks-per-node=1",
        "--gpus-per-node=0", "--cpus-per-task=1", "slurm/train.sbatch", *SMALL,
        f"run.dir={run_dir}",
    )  # fmt: skip
    return Watched(run_dir, project, job_id, slurm)
