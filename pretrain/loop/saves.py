"""When a run saves: what is due, what is committed, what is kept."""

import logging
import time
from pathlib import Path

from pretrain.config import TrainConfig
from pretrain.engine import commit
from pretrain.engine.saving import Saved, prune_checkpoints
from pretrain.errors import CheckpointError
from pretrain.loop.lineage import read_lives
from pretrain.loop.record import Record
from pretrain.loop.spikes import first_bad_step
from pretrain.loop.steps import Session, StepRecord

log = logging.getLogger(__name__)

SKIPPED = "skipped"
"""The tag of the last checkpoint whose step had no update: `pretrain replay` starts from it."""


def tag_earlier(config: TrainConfig, *, reached: int) -> None:
    """Tag the checkpoints of steps that a run has taken, for the process that owns its folder.

    Those whose tag the life before did not have, and the one that the run goes on from: that life
    may have died before it could. Any other tag that has gone was removed by hand.
    """
    run_dir = Path(config.run.dir)
    # not config.yaml: `pretrain submit` writes new tags there before a life knows of them
    lives = read_lives(run_dir)
    known = lives[-1].tags if lives else {}
    there = {commit.step_of(folder): folder for folder in commit.committed(run_dir)}
    for tag, step in config.checkpoint.tags.items():
        is_new = known.get(tag) != step
        if step > reached or not (is_new or step == reached):
            continue
        if step in there:
            commit.write_tag(run_dir, tag, step)
            log.info("%s is kept as checkpoints/tags/%s", there[step].name, tag)
        elif is_new:
            log.warning(
                "checkpoint.tags.%s=%d keeps nothing: the run is at step %d, and has checkpoints "
                "of %s",
                tag, step, reached, ", ".join(str(other) for other in there) or "no step",
            )  # fmt: skip


class Saves:
    """The saves of one life; all ranks call every method together.

    A save that fails in mid-run is reported and survived; the last one must succeed.
    """

    def __init__(self, session: Session, record: Record) -> None:
        self._session, self._record = session, record
        self._config = session.config.checkpoint
        self._run_dir = Path(session.config.run.dir)
        self._tags: dict[int, list[str]] = {}
        for tag, step in self._config.tags.items():
            self._tags.setdefault(step, []).append(tag)
        self._tags_on_the_way: list[str] = []
        self._last_skipped: int | None = None
        self._is_asked = False
        self._blocked_s = 0.0

    def after_step(self, step: StepRecord, *, is_leaving: bool) -> None:
        """Commit what all ranks have written, and begin what is due."""
        saver = self._session.saver
        if saver.is_in_flight and (step.has_written or is_leaving):
            self._finish(must=False)
        # one that is on its way answers whoever asks meanwhile; a rewind may have given it up
        is_asked = step.should_save and not (self._is_asked and saver.is_in_flight)
        if self._is_due(step.step) or is_leaving or is_asked:
            self._is_asked |= step.should_save
            self._save(must=is_leaving)

    def finish(self) -> None:
        """Wait for a save that is on its way, and commit it."""
        if self._session.saver.is_in_flight:
            self._finish(must=False)

    def settle(self) -> None:
        """Before the run goes back: commit what is on its way from before the bad steps.

        Where it goes back to then does not depend on how fast a disk is. A later save is given up.
        """
        saver = self._session.saver
        step = saver.step_in_flight
        if step is not None and step < first_bad_step(self._session.state):
            self._finish(must=False)
        saver.abandon()

    def _is_due(self, step: int) -> bool:
        return (
            step % self._config.every_steps == 0 or step in self._tags or self._is_first_skip(step)
        )

    def _is_first_skip(self, step: int) -> bool:
        """Whether the weights of a dropped update are worth a save of their own.

        The first of several in a row, and no two within the usual time between saves; what was
        saved later than this step, a rewind has deleted.
        """
        if not self._session.config.guards.save_on_skip:
            return False
        if self._session.state.skipped_in_a_row != 1:
            return False
        last = self._last_skipped
        return last is None or not 0 <= step - last < self._config.every_steps

    def _save(self, *, must: bool) -> None:
        session = self._session
        step = session.state.step
        started = time.monotonic()
        if session.saver.is_in_flight:
            self._finish(must=False)
        if existing := session.saver.has_saved(step):
            log.info("%s exists and is whole", existing)
            self._answer()
            return
        self._tags_on_the_way = list(self._tags.get(step, []))
        if self._is_first_skip(step):
            self._tags_on_the_way.append(SKIPPED)
            self._last_skipped = step
        self._record.sync()
        state = {"train": session.state.as_dict(), **session.identity}
        try:
            session.saver.begin(step, state, beside=not must)
        except CheckpointError as error:
            self._fail(error, must=must)
            return
        self._blocked_s = time.monotonic() - started
        if must or not self._config.asynchronous:
            self._finish(must=must)

    def _finish(self, *, must: bool) -> None:
        started = time.monotonic()
        try:
            saved = self._session.saver.finish()
        except CheckpointError as error:
            self._fail(error, must=must)
            return
        self._blocked_s += time.monotonic() - started
        log.info("saved %s", saved.path)
        self._answer()
        self._record.saved(self._session.state, saved, blocked_s=self._blocked_s)
        if self._session.world.is_main:
            self._keep(saved)

    def _answer(self) -> None:
        """control/save has been obeyed, if it was there."""
        if self._is_asked:
            self._session.control.forget("save")
        self._is_asked = False

    def _keep(self, saved: Saved) -> None:
        """Write the tags of a checkpoint, then delete those that are no longer wanted."""
        try:
            for tag in self._tags_on_the_way:
                commit.write_tag(self._run_dir, tag, saved.step)
            first_bad = first_bad_step(self._session.state)
            prune_checkpoints(self._run_dir, self._config, saved=saved.path, first_bad=first_bad)
        except OSError as error:
            log.error("an old checkpoint could not be deleted, or a tag not written: %s", error)

    def _fail(self, error: CheckpointError, *, must: bool) -> None:
        if must:
            raise error
        # tried once for whoever asked, and said; not again at every step
        self._answer()
        log.error("training goes on without this save: %s", error)
        self._record.save_failed(self._session.state, error)
