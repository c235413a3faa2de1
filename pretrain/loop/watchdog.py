"""Ends a job that stands still, and says which rank stood still first, and in what.

The main thread of every rank says where it is; a thread beside it tells a key-value store that
rank 0 serves. When rank 0 has been in one place for too long, its thread compares all ranks: one
whose thread is silent was stopped or is gone; else those that are furthest behind hold up the
others. All ranks learn the verdict from the store and end; if rank 0's own thread falls silent,
each rank that is late says so. Clocks are monotonic, and ages are judged by the reader's own, so a
step of the wall clock changes nothing.
"""

import datetime
import faulthandler
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from pretrain.engine.world import World, exit_now
from pretrain.errors import EXIT_STALLED
from pretrain.loop.exit_record import note_exit
from pretrain.loop.flight_recorder import flight_record
from pretrain.loop.run_folder import log_file

log = logging.getLogger(__name__)

# So often a rank tells where it is: at least this often, and several times within the limit.
_LONGEST_INTERVAL_S = 5.0
_BEATS_PER_LIMIT = 20
# Beats that a living thread may miss on a busy machine.
_MISSED_BEATS = 4
# A rank ends without its last words if they take so long: the run folder's disk may be what hangs.
_LAST_WORDS_S = 30.0
_VERDICT = "verdict"


class Beat(NamedTuple):
    """Where a rank is."""

    told: int
    """How often its thread has told it."""
    entered: int
    """How many places it has come through; the same sequence on every rank."""
    step: int
    phase: str
    seconds: float
    """How long it has been there."""
    host: str


def verdict_of(before: Sequence[Beat | None], after: Sequence[Beat | None]) -> str:
    """Who holds up the others, from two looks that are several beats apart."""
    silent = [
        rank
        for rank, (old, new) in enumerate(zip(before, after, strict=True))
        if new is None or (old is not None and old.told == new.told)
    ]
    living = [beat for rank, beat in enumerate(after) if rank not in silent and beat is not None]
    if silent:
        named = "; ".join(_say(rank, after[rank], "was last seen") for rank in silent)
        return (
            f"{len(silent)} of {len(after)} ranks are silent (stopped, killed, or their node is "
            f"gone): {named}. The others wait in {_places(living)}."
        )
    furthest = max(beat.entered for beat in living)
    behind = [
        rank for rank, beat in enumerate(after) if beat is not None and beat.entered < furthest
    ]
    if behind:
        named = "; ".join(_say(rank, after[rank], "is") for rank in behind)
        waiting = [beat for beat in living if beat.entered == furthest]
        return (
            f"{len(behind)} of {len(after)} ranks hold up the others: {named}. The others wait in "
            f"{_places(waiting)}."
        )
    return (
        f"all {len(after)} ranks are in {_places(living)} and none of them moves: a collective or "
        "a device hangs."
    )


def _say(rank: int, beat: Beat | None, verb: str) -> str:
    if beat is None:
        return f"rank {rank} (never seen)"
    return (
        f"rank {rank} on {beat.host} {verb} in {beat.phase} of step {beat.step} "
        f"for {beat.seconds:.0f} s"
    )


def _places(beats: Sequence[Beat]) -> str:
    return ", ".join(sorted({f"{beat.phase} of step {beat.step}" for beat in beats})) or "nothing"


class Watchdog:
    """Watches this rank while entered; see the top of the file.

    `enter` at every place that may take long. A rank alone only watches itself. `at_end` is called
    from its thread after the verdict, before the process ends.
    """

    def __init__(
        self,
        world: World,
        run_dir: Path,
        *,
        limit_s: float,
        at_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._world, self._run_dir, self._limit_s = world, run_dir, limit_s
        self._at_end = at_end
        self._interval_s = min(_LONGEST_INTERVAL_S, limit_s / _BEATS_PER_LIMIT)
        self._place = (0, 0, "start", time.monotonic())
        self._has_ended = threading.Event()
        self._heard = time.monotonic()
        self._main_beat = b""
        self._verdict = ""
        self._store: Any = None

    def __enter__(self) -> "Watchdog":
        self._store = _open_store(self._world, timeout_s=max(1.0, 2 * self._interval_s))
        self._heard = time.monotonic()
        # apart: a store whose server was stopped may keep its client for ever
        for deed in (self._talk, self._watch):
            threading.Thread(target=deed, name=f"watchdog{deed.__name__}", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()

    def enter(self, step: int, phase: str) -> None:
        """Say where the main thread is from now on; every rank comes through the same places."""
        self._place = (self._place[0] + 1, step, phase, time.monotonic())

    def _talk(self) -> None:
        told = 0
        while not self._verdict and not self._has_ended.wait(self._interval_s):
            told += 1
            try:
                self._verdict = self._tell(told)
            except (RuntimeError, OSError) as error:
                log.debug("the watchdog's store does not answer: %s", error)

    def _watch(self) -> None:
        while not self._has_ended.wait(self._interval_s):
            if verdict := self._verdict or self._without_main():
                self._end(verdict)

    def _tell(self, told: int) -> str:
        """Tell this rank's place, and hear whether there is a verdict."""
        self._store.set(f"beat/{self._world.rank}", json.dumps(self._beat(told)))
        said, main_beat = self._store.multi_get([_VERDICT, "beat/0"])
        if main_beat != self._main_beat:
            # the store may answer while rank 0's interpreter stands still
            self._main_beat, self._heard = main_beat, time.monotonic()
        verdict = str(said.decode())
        if not verdict and self._world.is_main and self._is_late():
            verdict = self._judge(told)
            self._store.set(_VERDICT, verdict)
        return verdict

    def _beat(self, told: int) -> Beat:
        entered, step, phase, since = self._place
        return Beat(told, entered, step, phase, time.monotonic() - since, socket.gethostname())

    def _is_late(self) -> bool:
        return time.monotonic() - self._place[3] > self._limit_s

    def _judge(self, told: int) -> str:
        """Look twice, some beats apart. The verdict is empty if this rank has moved meanwhile."""
        place = self._place
        before = self._all_beats()
        for missed in range(1, _MISSED_BEATS + 1):
            time.sleep(self._interval_s)
            beat = json.dumps(self._beat(told + missed))
            self._store.set(f"beat/{self._world.rank}", beat)
        return "" if self._place != place else verdict_of(before, self._all_beats())

    def _all_beats(self) -> list[Beat | None]:
        keys = [f"beat/{rank}" for rank in range(self._world.size)]
        return [
            Beat(*json.loads(value)) if value else None for value in self._store.multi_get(keys)
        ]

    def _without_main(self) -> str:
        """The verdict of a rank that has heard nothing from rank 0."""
        silence_s = time.monotonic() - self._heard
        is_silent = silence_s > _MISSED_BEATS * self._interval_s
        if self._world.is_main or not self._is_late() or not is_silent:
            return ""
        return (
            f"rank 0 is silent (stopped, killed, or its node is gone): nothing was heard of it for "
            f"{silence_s:.0f} s, and {_say(self._world.rank, self._beat(0), 'waits')}."
        )

    def _end(self, verdict: str) -> None:
        """Leave the verdict, all stacks and the last collectives, and end the process."""
        pause_s = _MISSED_BEATS * self._interval_s
        last = threading.Timer(
            min(_LAST_WORDS_S, self._limit_s) + pause_s, os._exit, [EXIT_STALLED]
        )
        last.daemon = True
        last.start()
        note_exit(EXIT_STALLED)
        speaks = self._world.rank == 0 or verdict.startswith("rank 0 ")
        log.log(
            logging.ERROR if speaks else logging.INFO,
            "no progress for %.0f s (guards.stall_s): %s",
            self._limit_s,
            verdict,
        )
        try:
            if speaks:
                line = json.dumps({"step": self._place[1], "verdict": verdict}) + "\n"
                with (self._run_dir / "stalls.jsonl").open("a", encoding="utf-8") as file:
                    file.write(line)
            path = log_file(self._run_dir, self._world.rank).with_suffix(".stacks")
            with path.open("a", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            if record := flight_record():
                path.with_suffix(".flight.json").write_bytes(record)
            self._at_end()
        except OSError as error:
            log.error("the stacks could not be written: %s", error)
        if self._world.is_main:
            # who serves the store leaves last
            time.sleep(pause_s)
        exit_now(EXIT_STALLED)


def _open_store(world: World, *, timeout_s: float) -> Any:
    """A store of the watchdogs' own: what waits in another one's queue would be late here."""
    timeout = datetime.timedelta(seconds=timeout_s)
    if world.size == 1:
        store: Any = dist.HashStore()  # type: ignore[attr-defined]
    elif world.is_main:
        store = TCPStore(world.host, 0, is_master=True, wait_for_workers=False)
        world.broadcast_object(store.port)
    else:
        port = world.broadcast_object(None)
        store = TCPStore(world.host, port, is_master=False)
    store.set_timeout(timeout)
    if world.is_main:
        store.set(_VERDICT, "")
        for rank in range(world.size):
            store.set(f"beat/{rank}", "")
    world.barrier()
    return store
