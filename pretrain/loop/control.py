"""Asking a run for something by touching a file in its folder: `<run.dir>/control/`.

stop    save and leave, as after SIGTERM, but the job does not queue again; stays until removed
save    save at the next step boundary; removed when that save is committed or has failed
pause   wait at the next step boundary for as long as the file is there

Whoever may write into the run folder may ask, whoever owns the job. Rank 0 looks once per step, and
the step's own sum over ranks tells the others.
"""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    # it brings torch, and whoever only looks for a request needs none
    from pretrain.engine.world import World

log = logging.getLogger(__name__)

FOLDER = "control"
# How soon a paused run goes on; every look is one small collective.
_LOOK_EVERY_S = 1.0


class Requests(NamedTuple):
    """What is asked for; the names are those of the files."""

    stop: bool = False
    save: bool = False
    pause: bool = False


class Control:
    """The control files of a run. Every rank has one; only rank 0's ever sees a file."""

    def __init__(self, run_dir: Path, world: "World") -> None:
        self._folder, self._world = run_dir / FOLDER, world
        self._unknown: set[str] = set()
        self.last = Requests()
        """What the last look saw."""

    def open(self) -> None:
        """Make the folder, so that a plain `touch` is enough."""
        if self._world.is_main:
            self._folder.mkdir(parents=True, exist_ok=True)

    def poll(self) -> Requests:
        """What is asked for now; nothing on other ranks than 0, or if the folder cannot be read."""
        if self._world.is_main:
            names = self._names()
            self.last = Requests(**{name: name in names for name in Requests._fields})
        return self.last

    def _names(self) -> set[str]:
        try:
            names = set(os.listdir(self._folder))
        except FileNotFoundError:
            return set()
        except OSError as error:
            log.warning("%s cannot be read (%s); nothing is asked for", self._folder, error)
            return set()
        for name in sorted(names - set(Requests._fields) - self._unknown):
            log.warning(
                "%s asks for nothing: it is none of %s",
                self._folder / name,
                ", ".join(Requests._fields),
            )
        self._unknown |= names
        return names

    def is_stopped(self) -> bool:
        """Whether `stop` is there, on every rank; all ask together."""
        return self._world.any(self.poll().stop)

    def forget(self, name: str) -> None:
        """Remove a file whose wish has been granted."""
        if not self._world.is_main:
            return
        try:
            (self._folder / name).unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s stays and will be obeyed again: %s", self._folder / name, error)

    def wait_while_paused(
        self, *, is_interrupted: Callable[[], bool], heartbeat: Callable[[], None]
    ) -> None:
        """Wait until `pause` is gone, `stop` is there, or a rank is interrupted; all together.

        `heartbeat` is called at every look, so that neither watchdog nor lock grows old.
        """
        started = time.monotonic()
        has_spoken = False
        while True:
            heartbeat()
            asked = self.poll()
            paused, ended = self._world.sum([asked.pause, asked.stop or is_interrupted()])
            if not paused or ended:
                break
            if self._world.is_main and not has_spoken:
                log.warning("paused: remove %s to go on", self._folder / "pause")
            has_spoken = True
            time.sleep(_LOOK_EVERY_S)
        if self._world.is_main and has_spoken:
            log.warning("goes on after a pause of %.0f s", time.monotonic() - started)
