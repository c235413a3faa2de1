"""A sweep: the runs that one command has submitted, and what became of each."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pretrain.errors import CheckpointError, ConfigError, PretrainError
from pretrain.jobs.progress import Progress, read_progress
from pretrain.jobs.queue import jobs_of, queued

_FILE = "sweep.json"
_WAITS = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED")


class State(Enum):
    """What a run of a sweep is doing."""

    queued = "queued"
    running = "running"
    finished = "finished"
    failed = "failed"
    """It has ended without its last step, or not well with it, and is not in the queue."""
    unknown = "unknown"
    """It is not finished, and no SLURM answers here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One run of a sweep."""

    run_dir: str
    """Its folder, absolute."""
    swept: dict[str, str]
    """The overrides that not all runs share, by key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PointReport:
    """One run of a sweep, as it is now."""

    point: Point
    state: State
    progress: Progress | None
    """None if its folder cannot be read."""
    job_ids: list[str]
    """Of jobs in the queue."""


def swept_values(jobs: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """The overrides of each job that are not the same for all, by key."""
    shared = set.intersection(*(set(job) for job in jobs))
    return [
        dict(text.split("=", 1) for text in job if text not in shared and "=" in text)
        for job in jobs
    ]


def write_sweep(folder: Path, points: Sequence[Point]) -> None:
    """Write sweep.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{_FILE}.tmp-{os.getpid()}"
    rows = {"points": [asdict(point) for point in points]}
    temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / _FILE)


def check_sweep_folder(folder: Path, points: Sequence[Point]) -> None:
    """Raise ConfigError if sweep.json has runs that it would no longer have with these points."""
    if not (folder / _FILE).is_file():
        return
    gone = {point.run_dir for point in read_sweep(folder)} - {point.run_dir for point in points}
    if gone:
        raise ConfigError(
            f"submit.sweep_dir={folder} lists {len(gone)} runs that are not among these, such as "
            f"{min(gone)}. Choose another submit.sweep_dir, or sweep over those too: runs that "
            "have a job or all their steps are left alone."
        )


def read_sweep(folder: Path) -> list[Point]:
    """The runs of a sweep. Raises ConfigError if the folder has none, or its file is damaged."""
    path = folder / _FILE
    try:
        return [Point(**row) for row in json.loads(path.read_text(encoding="utf-8"))["points"]]
    except FileNotFoundError:
        raise ConfigError(
            f"sweep.dir={folder} has no {_FILE}; give the folder that `pretrain submit "
            "--multirun` has named."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}.") from error


def report(points: Sequence[Point]) -> list[PointReport]:
    """What became of each run, by the queue and by its folder."""
    jobs = queued()
    reports = []
    for point in points:
        folder = Path(point.run_dir)
        try:
            progress = read_progress(folder)
        except PretrainError:
            progress = None
        own = jobs_of(folder, jobs or [])
        if progress is not None and progress.is_finished:
            state = State.finished
        elif jobs is None:
            state = State.unknown
        elif not own:
            state = State.failed
        else:
            is_waiting = all(job.state in _WAITS for job in own)
            state = State.queued if is_waiting else State.running
        ids = [job.job_id for job in own]
        reports.append(PointReport(point=point, state=state, progress=progress, job_ids=ids))
    return reports


COLUMNS = ("state", "job", "step", "of", "loss", "held out", "run")


def cells(line: PointReport) -> list[str]:
    """A report under COLUMNS, after the swept values."""
    progress = line.progress
    numbers = ["", "", "", ""]
    if progress is not None:
        numbers = [
            str(progress.step),
            str(progress.last_step),
            _nats(progress.loss_nats),
            _nats(progress.held_out_nats),
        ]
    values = list(line.point.swept.values())
    return [*values, line.state.value, " ".join(line.job_ids), *numbers, line.point.run_dir]


def print_table(title: str, lines: Sequence[PointReport]) -> None:
    """One row for each run."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in (*lines[0].point.swept, *COLUMNS):
        table.add_column(name, overflow="fold")
    for line in lines:
        table.add_row(*cells(line))
    console.print(table)


def _nats(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"
