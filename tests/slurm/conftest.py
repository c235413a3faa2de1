"""A private SLURM, a project folder that jobs are submitted from, and what recoveries took.

With PRETRAIN_SLURM_TESTS=required a test that cannot run fails.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from private_slurm import NEEDED, Slurm, find_program, start_daemons
from watching import Project

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A SLURM of two idle nodes."""
    missing = [name for name in NEEDED if not find_program(name)]
    reason = f"not found: {', '.join(missing)}" if missing else ""
    if not missing and os.getuid() != 0:
        reason = "slurmd needs root to start tasks"
    if reason:
        if os.environ.get("PRETRAIN_SLURM_TESTS") == "required":
            pytest.fail(f"SLURM tests are required here, but {reason}")
        pytest.skip(f"{reason}; on Debian: apt-get install slurm-wlm munge")
    # A socket's path has at most 107 characters, so not below pytest's folder.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    cluster = Slurm(folder)
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
    """Submits a script of the project; nodes run this interpreter and this code.

    Without the preflight, which has tests of its own.
    """
    added = {
        "PRETRAIN_PYTHON": sys.executable,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "PRETRAIN_PREFLIGHT": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in added.items():
            patch.setenv(name, value)
        yield lambda *words: slurm.submit(*words, cwd=project.folder)
