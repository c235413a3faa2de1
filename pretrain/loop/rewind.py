"""Going back to the checkpoint before a loss spike, and past the rows that it began among."""

import logging
from pathlib import Path

from pretrain.engine import commit
from pretrain.engine.checkpoint import load_checkpoint, newest_checkpoint
from pretrain.errors import DivergenceError
from pretrain.loop.passed_over import Rewind, append_rewind
from pretrain.loop.record import Record
from pretrain.loop.run_folder import on_rank_0
from pretrain.loop.saves import Saves
from pretrain.loop.spikes import first_bad_step
from pretrain.loop.state import TrainState
from pretrain.loop.steps import Session

log = logging.getLogger(__name__)


def rewind(session: Session, record: Record, saves: Saves) -> bool:
    """Take the run back to before the last bad steps; all ranks call it together.

    False without a checkpoint from before: nothing changes then but a line in the log. Raises
    DivergenceError if the run has gone back as often as guards.spike.max_rewinds allows.

    A death at any instant here leaves a run that repeats the spike and comes here again: later
    checkpoints go first, and only then the rows are passed over.
    """
    config, world, state = session.config, session.world, session.state
    run_dir, first_bad = Path(config.run.dir), first_bad_step(state)
    limit = config.guards.spike.max_rewinds
    saves.settle()
    if len(session.rewinds) >= limit:
        raise DivergenceError(
            f"Steps {first_bad} to {state.step} are loss spikes, and the run has gone back "
            f"{limit} times already (guards.spike.max_rewinds). Lower optimizer.learning_rate, or "
            "look at the rows with `pretrain replay`, and resume."
        )
    target = newest_checkpoint(run_dir, world, up_to=first_bad - 1)
    if target is None:
        log.error(
            "steps %d to %d are loss spikes, and there is no checkpoint from before to go back to; "
            "the run goes on. A smaller checkpoint.every_steps would have one.",
            first_bad,
            state.step,
        )
        return False
    from_step, next_row = state.step, state.rows
    on_rank_0(world, lambda: _delete_later(run_dir, target))
    lives, trained_s = state.lives, state.trained_s
    session.state = TrainState.from_dict(load_checkpoint(session.engine, world, target)["train"])
    session.state.lives, session.state.trained_s = lives, trained_s
    entry = Rewind(from_step, session.state.step, session.state.rows, next_row)
    on_rank_0(world, lambda: append_rewind(run_dir, entry))
    session.rewinds.append(entry)
    session.forget_batches()
    log.error(
        "steps %d to %d were loss spikes: back to step %d, past %d rows from row %d on (rewind %d "
        "of %d)",
        first_bad,
        from_step,
        entry.to_step,
        next_row - entry.first_row,
        entry.first_row,
        len(session.rewinds),
        limit,
    )
    record.rewound(session.state)
    return True


def _delete_later(run_dir: Path, target: Path) -> None:
    later = commit.committed(run_dir)
    # the newest last: whoever dies here leaves a run that repeats the spike from an earlier one
    for folder in later[: later.index(target)]:
        commit.delete(folder)
        log.warning("deleted %s: it was saved during the spike", folder.name)
    commit.point_to(target)
