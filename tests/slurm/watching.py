"""A project that jobs are submitted from, and a run of one of them, seen from outside."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from lives import read_steps
from private_slurm import ROOT, Slurm

from pretrain.loop.lineage import Life, read_lives

STEP_LINE = re.compile(r"^step +\d+/", flags=re.M)
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


@contextmanager
def job_environment() -> Iterator[None]:
    """What jobs inherit: this interpreter and this code; no preflight, which has its own tests."""
    added = {
        "PRETRAIN_PYTHON": sys.executable,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "PRETRAIN_PREFLIGHT": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in added.items():
            patch.setenv(name, value)
        yield


@dataclass
class Project:
    """A folder with the scripts, and outputs of its own."""

    folder: Path

    def log(self, job_id: str) -> str:
        """Everything that the job and its ranks have written."""
        files = sorted((self.folder / "slurm/logs").glob(f"*-{job_id}.log"))
        files += sorted((self.folder / "slurm/logs").glob(f"*-{job_id}/**/*"))
        return "\n".join(f"[{path.name}]\n{path.read_text()}" for path in files if path.is_file())


@dataclass
class Watched:
    """The run folder of a job."""

    run_dir: Path
    project: Project
    job_id: str
    slurm: Slurm

    def lives(self) -> list[Life]:
        """Its lives so far."""
        return read_lives(self.run_dir)

    def until(self, condition: Callable[[], bool], timeout_s: float = 240) -> None:
        """Wait for something that must happen before the job has ended."""
        deadline = time.monotonic() + timeout_s
        asked = time.monotonic()
        while not condition():
            assert time.monotonic() < deadline, self.project.log(self.job_id)
            if time.monotonic() - asked > 1:
                asked = time.monotonic()
                state = self.slurm.job(self.job_id)["JobState"]
                assert state not in FINISHED or condition(), self.project.log(self.job_id)
            time.sleep(0.05)

    def wait_for_steps(self, steps: int, *, after_life: int = 0) -> tuple[int, float]:
        """Wait until a later life has taken so many steps; its number, and when it took its first.

        On a busy machine a life may end early by a timeout of its own; then it is a later one.
        """
        life, first_seen = 0, 0.0

        def has_taken() -> bool:
            nonlocal life, first_seen
            lives = self.lives()
            if len(lives) <= after_life:
                return False
            if life != len(lives):
                life, first_seen = len(lives), 0.0
            said = self.rank_0().rpartition(f"life {life} begins at step")[2]
            taken = len(STEP_LINE.findall(said))
            if taken and not first_seen:
                first_seen = time.monotonic()
            return taken >= steps

        self.until(has_taken)
        return life, first_seen

    def rank_0(self) -> str:
        """What rank 0 has said."""
        paths = (self.project.folder / "slurm/logs").glob(f"*-{self.job_id}/rank-0.log")
        return "".join(path.read_text() for path in paths)

    def steps(self) -> list[int]:
        """The steps on record, each once."""
        return sorted(read_steps(self.run_dir))
