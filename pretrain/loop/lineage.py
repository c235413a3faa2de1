"""lineage.jsonl: the lives of a run, and how much of the time went into steps that count.

A line when a life begins and one when it ends. A life without the second was killed, or lives.
Times are seconds since 1970 by the clock of rank 0's host; they span machines and lives.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pretrain.errors import CheckpointError, DataError
from pretrain.loop.metrics import read_metrics

if TYPE_CHECKING:
    # it brings torch, and whoever only reads lives needs none
    from pretrain.engine.world import World

log = logging.getLogger(__name__)

FILE = "lineage.jsonl"
UNKNOWN = "unknown"
"""Why a life ended that left no line about it."""
FINISHED, STALLED, STOPPED = "finished", "stalled", "stop"
"""Reasons beside the names of signals and of errors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Life:
    """One life of a run, as its lines tell it."""

    number: int
    """From 1."""
    began_s: float
    job_id: str
    restart_count: int
    nodes: list[str]
    """Of every rank's node, each once, in order of rank."""
    ranks: int
    first_step: int
    """Steps that were taken before."""
    tags: dict[str, int] = field(default_factory=dict)
    """checkpoint.tags; older lines have none."""
    last_step: int | None = None
    """None if its end is unknown."""
    ended_s: float | None = None
    reason: str = UNKNOWN
    """finished; a signal's name; stop (control/stop); stalled; an error's class; unknown."""
    goodput: float | None = None
    """Of the run so far, when this life ended."""


class Lineage:
    """Writes the two lines of this life, on rank 0; the other ranks' writes nothing.

    Entered when the life begins; leaving writes the end, with `reason`, or the error's class.
    `fence` raises CheckpointError if the folder has another holder: then nothing is written.
    """

    def __init__(
        self,
        run_dir: Path,
        world: "World",
        *,
        first_step: int,
        tags: Mapping[str, int],
        fence: Callable[[], None],
    ) -> None:
        self._run_dir, self._world, self._fence = run_dir, world, fence
        self._tags = tags
        self._number, self._has_ended = 0, False
        self.first_step = self.last_step = first_step
        self.reason = UNKNOWN

    def __enter__(self) -> "Lineage":
        nodes = list(dict.fromkeys(self._world.gather_objects(node_name())))
        if not self._world.is_main:
            return self
        self._number = len(read_lives(self._run_dir)) + 1
        self._append(
            {
                "event": "begin",
                "life": self._number,
                "time_s": time.time(),
                "job_id": os.environ.get("SLURM_JOB_ID", ""),
                "restart_count": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
                "nodes": nodes,
                "ranks": self._world.size,
                "first_step": self.first_step,
                "tags": dict(self._tags),
            }
        )
        log.info(
            "life %d begins at step %d: %s on %s",
            self._number,
            self.first_step,
            "1 rank" if self._world.size == 1 else f"{self._world.size} ranks",
            ", ".join(nodes),
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end(self.reason if kind is None else kind.__name__)

    def end(self, reason: str) -> None:
        """Write why this life ends, once, unless the folder has a new holder."""
        if not self._world.is_main or self._has_ended:
            return
        self._has_ended = True
        try:
            self._fence()
        except CheckpointError:
            return
        now_s = time.time()
        share = run_goodput(self._run_dir, now_s=now_s)
        log.info("life %d ends: %s; goodput of the run %.3f", self._number, reason, share)
        self._append(
            {
                "event": "end",
                "life": self._number,
                "time_s": now_s,
                "last_step": self.last_step,
                "reason": reason,
                "goodput": share,
            }
        )

    def _append(self, line: Mapping[str, Any]) -> None:
        """One line in one write, behind a torn one if there is one; a full disk only loses it."""
        path = self._run_dir / FILE
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                size = os.fstat(file).st_size
                is_torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
                content = (b"\n" if is_torn else b"") + json.dumps(line).encode() + b"\n"
                os.write(file, content)
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            log.warning("%s cannot be written: %s", path, error)


def node_name() -> str:
    """What the scheduler calls this host, or what it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def read_lives(run_dir: Path) -> list[Life]:
    """The lives of a run, oldest first; lines that a crash tore are left out."""
    lives: dict[int, Life] = {}
    try:
        lines = (run_dir / FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            record = json.loads(line)
            _take(lives, record)
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("%s has a line that is torn or damaged: %r", run_dir / FILE, line[:60])
    return list(lives.values())


def _take(lives: dict[int, Life], record: dict[str, Any]) -> None:
    event, number, time_s = record.pop("event"), record.pop("life"), record.pop("time_s")
    if event == "begin":
        lives[number] = Life(number=number, began_s=time_s, **record)
        return
    begun = lives[number]
    lives[number] = Life(
        **{name: getattr(begun, name) for name in begun.__slots__} | record | {"ended_s": time_s}
    )


def goodput(lives: Sequence[Life], records: Iterable[Mapping[str, Any]], *, now_s: float) -> float:
    """Share of the time since the first life began that was spent in steps that count.

    Steps that were taken back are not in `records` (metrics.jsonl); waiting in the queue, starting,
    compiling, validating and saving are in the time but in no step.
    """
    if not lives:
        return 0.0
    return _share(sum(_step_s(record) for record in records), now_s - lives[0].began_s)


def _step_s(record: Mapping[str, Any]) -> float:
    return float(record.get("speed/step_s", 0.0))


def _share(counted_s: float, passed_s: float) -> float:
    # a wall clock that was set back must not give more than everything
    return counted_s / max(passed_s, counted_s) if counted_s else 0.0


class GoodputSoFar:
    """`goodput` of a run while it trains: each step adds its seconds to those before."""

    def __init__(self, run_dir: Path, records: Iterable[Mapping[str, Any]]) -> None:
        """`records`: those of the run so far."""
        lives = read_lives(run_dir)
        self._began_s = lives[0].began_s if lives else time.time()
        self._counted_s = sum(_step_s(record) for record in records)

    def after(self, step_s: float) -> float:
        """The share once a step of `step_s` seconds has ended, now."""
        self._counted_s += step_s
        return _share(self._counted_s, time.time() - self._began_s)


def run_goodput(run_dir: Path, *, now_s: float) -> float:
    """Goodput of a run folder; 0 if it has no step, or no record that can be read."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return 0.0
    try:
        return goodput(read_lives(run_dir), read_metrics(path), now_s=now_s)
    except (DataError, OSError) as error:
        log.warning("no goodput: %s", error)
        return 0.0
