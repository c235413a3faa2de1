"""A run folder as a report sees it: configuration, record, lives, and what went wrong."""

import json
import logging
import math
import statistics
import time
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.compose import thaw
from pretrain.config import TrainConfig
from pretrain.loop.control import FOLDER as CONTROL
from pretrain.loop.lineage import FINISHED, STOPPED, UNKNOWN, Life, goodput, read_lives
from pretrain.loop.origin import read_origin
from pretrain.loop.passed_over import Rewind, read_rewinds
from pretrain.loop.state import TrainState, last_step, total_tokens
from pretrain.reporting.record import RunRecord, Series

log = logging.getLogger(__name__)

# A record that is older than so many of its steps is not growing.
_SILENT_STEPS = 20
_SILENT_S = 60.0
# Steps that speeds and times left look back on, as the console's do.
_RECENT_STEPS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a run folder holds, read once."""

    folder: Path
    name: str
    """The run's, or its folder's where it is shown beside another run of that name."""
    config: TrainConfig
    record: RunRecord
    discarded: RunRecord
    """Steps that a later life or a rewind took back."""
    lives: list[Life]
    rewinds: list[Rewind]
    stalls: list[dict[str, Any]]
    lost_rows: list[dict[str, Any]]
    """Rows that damage has cost."""
    evaluations: list[dict[str, Any]]
    """Of `pretrain evaluate`, by step; lists as in a validation."""
    scores: list[dict[str, Any]]
    """Of `pretrain evaluate` on tasks: the newest summary of each task, by name."""
    snapshots: list[dict[str, Any]]
    """Where the code of submitted jobs came from."""
    origin: dict[str, Any]
    """Code, software and devices of the newest life."""
    heartbeat_s: float
    """When its living process last touched the lock, seconds since 1970; 0 if there is none."""
    is_asked_to_pause: bool
    """Whether control/pause is there."""

    @property
    def last_step(self) -> int:
        """The step at which it ends."""
        return last_step(self.config, self._reached)

    @property
    def total_tokens(self) -> int:
        """Tokens that it will have read at its end."""
        return total_tokens(self.config, self._reached)

    @property
    def _reached(self) -> TrainState:
        return TrainState(step=self.record.step, tokens=int(self.record.tokens))

    def tokens_at(self, step: int) -> float:
        """Tokens that it had read after a step, as recorded: a later life may change the batch."""
        losses = self.record.series.get("loss/nats", Series())
        taken = bisect(losses.steps, step)
        return losses.tokens[taken - 1] if taken else 0.0

    @property
    def step_s(self) -> float:
        """Seconds of a step lately, NaN before the first: the median, so a save hides nothing."""
        series = self.record.series.get("speed/step_s")
        return statistics.median(series.values[-_RECENT_STEPS:]) if series else math.nan

    @property
    def left_s(self) -> float:
        """Seconds to the end at the pace of late, NaN before the first step."""
        return self.step_s * max(0, self.last_step - self.record.step)

    @property
    def goodput(self) -> float | None:
        """Share of the time since it first began that went into steps that count."""
        series = self.record.series.get("speed/step_s")
        if not self.lives or not series:
            return None
        steps = ({"speed/step_s": value} for value in series.values)
        return goodput(self.lives, steps, now_s=self.seen_s)

    @property
    def seen_s(self) -> float:
        """When it last showed itself alive, seconds since 1970."""
        ends = [life.ended_s or life.began_s for life in self.lives]
        return max([*ends, self.record.written_s, self.heartbeat_s])

    @property
    def state(self) -> str:
        """finished, running, paused, silent, or why its last life ended."""
        if not self.lives:
            return "not started" if not self.record.series else "no lineage"
        life = self.lives[-1]
        if life.ended_s is not None:
            return life.reason
        if self.record.step >= self.last_step:
            return FINISHED
        # until its first step a life may load and compile for minutes; the watchdog ends one that
        # stands still
        patience_s = self.config.guards.stall_s
        if self.record.step > life.first_step:
            patience_s = max(_SILENT_S, _SILENT_STEPS * self.step_s)
        if time.time() - self.seen_s > patience_s:
            return "silent"
        return "paused" if self.is_asked_to_pause else "running"


def read_run(folder: Path, *, earlier: Run | None = None) -> Run:
    """The run in `folder`; one that has not stepped yet is a run too.

    With `earlier`, an earlier reading of the same folder, only what its records gained is read.

    Raises CheckpointError if it is no run folder, or its rewinds.jsonl is damaged.
    """
    config = thaw(folder)
    if earlier is None:
        record = RunRecord(folder / "metrics.jsonl")
        discarded = RunRecord(folder / "metrics.discarded.jsonl")
    else:
        record, discarded = earlier.record, earlier.discarded
        record.refresh()
        discarded.refresh()
    return Run(
        folder=folder,
        name=config.run.name,
        config=config,
        record=record,
        discarded=discarded,
        lives=read_lives(folder),
        rewinds=read_rewinds(folder),
        stalls=_json_lines(folder / "stalls.jsonl"),
        lost_rows=_json_lines(folder / "quarantine.jsonl"),
        evaluations=_evaluations(folder),
        scores=_scores(folder),
        snapshots=_objects(sorted((folder / "code").glob("*/snapshot.json"))),
        origin=read_origin(folder),
        heartbeat_s=_modified_s(folder / "lock.json"),
        is_asked_to_pause=(folder / CONTROL / "pause").exists(),
    )


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs; those that share a name, as runs do that were given only a folder, have that."""
    count = Counter(run.name for run in runs)
    return [replace(run, name=str(run.folder)) if count[run.name] > 1 else run for run in runs]


def end_of(life: Life) -> str:
    """Why a life ended, in words."""
    if life.ended_s is None or life.reason == UNKNOWN:
        return "no end was recorded"
    return "asked to stop" if life.reason == STOPPED else life.reason


def is_orderly(reason: str) -> bool:
    """Whether a life that ended so had saved: finished, or was told to stop."""
    return reason in (FINISHED, STOPPED) or reason.startswith("SIG")


def _modified_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            log.warning("%s has a line that is torn or damaged: %r", path, line[:60])
    return found


def _objects(paths: list[Path]) -> list[dict[str, Any]]:
    found = []
    for path in paths:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read: %s", path, error)
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _evaluations(folder: Path) -> list[dict[str, Any]]:
    needed = ("step", "validation/depths", "validation/loss_nats")
    objects = _objects(sorted((folder / "evaluation").glob("step-*.json")))
    return [each for each in objects if all(key in each for key in needed)]


def _scores(folder: Path) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for each in _objects(sorted((folder / "evaluation").glob("step-*/*.json"))):
        if _is_summary(each):
            # folders come by step, so the newest of a task is the last
            found[each["task"]] = each
    return [found[name] for name in sorted(found)]


def _is_summary(value: dict[str, Any]) -> bool:
    """Whether it has at each depth a value and a standard error (or null) of each measure."""
    depths, scores = value.get("depths"), value.get("scores")
    if not isinstance(depths, list) or not isinstance(scores, dict) or not scores:
        return False
    lists = [score.get(key) for score in scores.values() for key in ("value", "standard_error")]
    has_place = isinstance(value.get("task"), str) and isinstance(value.get("step"), int)
    return has_place and all(
        isinstance(each, list) and len(each) == len(depths) > 0 for each in lists
    )
