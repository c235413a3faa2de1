"""SLURM's queue: putting a script into it, and asking what became of it. Never through a shell."""

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.errors import CheckpointError, ConfigError

_RECORD = "submit.json"
# Where SLURM's programs find their cluster, and by what it knows the user.
_FOR_CLIENTS = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Queued:
    """One job that waits or runs."""

    job_id: str
    """Its own, also of a task of an array."""
    state: str
    """SLURM's word: PENDING, RUNNING, COMPLETING, ..."""
    workdir: str
    """The folder it was given; ours are given the run's."""


def sbatch_command(script: Path, after: str | None) -> list[str]:
    """The words that queue a script, behind the end of the job `after` if one is named."""
    behind = [f"--dependency=afterany:{after}"] if after is not None else []
    return ["sbatch", "--parsable", *behind, str(script)]


def sbatch(script: Path, after: str | None) -> str:
    """Queue a script; the id of its job. Raises ConfigError with what sbatch said."""
    command = sbatch_command(script, after)
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=_own_environment())
    except FileNotFoundError:
        raise ConfigError(
            "There is no sbatch on this machine. Submit on the cluster's login node, or start "
            "the run here with submit.to=host, on other hosts with submit.to=hostfile."
        ) from None
    if done.returncode != 0:
        raise ConfigError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    # with several clusters: ID;CLUSTER
    return done.stdout.strip().split(";")[0]


def _own_environment() -> dict[str, str]:
    """The environment, without what SLURM tells the job that this process may be in.

    The new job would inherit it, and its srun obey it: memory, binding, GPUs, restarts.
    """
    environ = dict(os.environ)
    if "SLURM_JOB_ID" not in environ:
        return environ
    return {
        name: value
        for name, value in environ.items()
        if name in _FOR_CLIENTS or not name.startswith(("SLURM_", "SLURMD_", "SRUN_"))
    }


def queued() -> list[Queued] | None:
    """This user's jobs that have not ended; None where no SLURM answers."""
    # all: in hidden partitions too
    command = ["squeue", "--me", "--all", "--noheader", "--format=%A|%T|%Z"]
    # what a user likes to see of the queue hides the rest
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SQUEUE_")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    rows = (line.split("|", 2) for line in done.stdout.splitlines() if line.count("|") >= 2)
    return [Queued(job_id=job, state=state, workdir=folder) for job, state, folder in rows]


def has_ended(job_id: str) -> bool:
    """Whether a job of this user runs no longer and will not again; False if no SLURM says so."""
    jobs = queued()
    return jobs is not None and all(job.job_id != job_id for job in jobs)


def jobs_of(folder: Path, jobs: Sequence[Queued]) -> list[Queued]:
    """Those that belong to the run in `folder`, also ones that its jobs have submitted."""
    known = {submission.job_id for submission in submissions(folder)}
    place = str(folder.absolute())
    return [job for job in jobs if job.job_id in known or job.workdir == place]


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """One job of a run, as it was submitted."""

    job_id: str
    when: str
    tree_sha256: str
    """The code that it runs."""
    commit: str
    diff_sha256: str
    code: str
    """Folder of the snapshot."""
    changes: list[str]
    """Settings that it changed in a run that was there: key=value (was value)."""


def submissions(folder: Path) -> list[Submission]:
    """Every job of the run in `folder`, oldest first. Raises CheckpointError if that is damaged."""
    path = folder / _RECORD
    if not path.is_file():
        return []
    try:
        return [Submission(**values) for values in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Move it away.") from error


def record(folder: Path, new: Sequence[Submission]) -> None:
    """Add submissions to those of the run, whole or not at all."""
    rows = [asdict(submission) for submission in [*submissions(folder), *new]]
    temporary = folder / f"{_RECORD}.tmp-{os.getpid()}"
    temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / _RECORD)
