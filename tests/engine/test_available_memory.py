"""Limits of control groups, as SLURM, containers and neither of them show them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.engine.available_memory import available_bytes

GIB = 1 << 30
OF_A_JOB = "system.slice/slurmstepd.scope/job_7/step_0/user/task_0"


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host of 64 GiB, 48 of them available, whose processes are in no group."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("0::/\n")
    total, available = 64 * GIB >> 10, 48 * GIB >> 10
    (tmp_path / "meminfo").write_text(f"MemTotal: {total} kB\nMemAvailable: {available} kB\n")
    return tmp_path


def group(folder: Path, limit: str, used: int, files: int) -> None:
    """A group of the second version."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {files}\n")


def available(host: Path) -> int:
    return available_bytes(host, host / "groups")


def test_without_a_limit_it_is_the_host_s(host: Path) -> None:
    assert available(host) == 48 * GIB


def test_a_job_s_limit_counts_for_its_tasks_and_files_make_way(host: Path) -> None:
    (host / "self/cgroup").write_text(f"0::/{OF_A_JOB}\n")
    group(host / "groups" / OF_A_JOB, "max", 20 * GIB, 12 * GIB)
    job = host / "groups" / OF_A_JOB.partition("/step_0")[0]
    group(job, str(32 * GIB), 24 * GIB, 14 * GIB)
    assert available(host) == (32 - 24 + 14) * GIB


def test_a_container_sees_its_limit_at_the_root(host: Path) -> None:
    (host / "self/cgroup").write_text("0::/docker/of-the-host\n")
    group(host / "groups", str(4 * GIB), 5 * GIB, 0)
    assert available(host) == 0


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A real group of the first version, with 1 GiB."""
    folder = Path(f"/sys/fs/cgroup/memory/pretrain-{os.getpid()}")
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(GIB))
    except OSError as error:
        pytest.skip(f"no control group of the first version can be made here: {error}")
    yield folder
    folder.rmdir()


def test_a_real_limit_is_seen(small_group: Path) -> None:
    code = "from pretrain.engine.available_memory import available_bytes; print(available_bytes())"
    enter = f"echo $$ >{small_group}/cgroup.procs && exec {sys.executable} -c '{code}'"
    done = subprocess.run(["sh", "-c", enter], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) <= GIB
