"""The command `pretrain train`: one life of a run, from its newest checkpoint to its end.

One process, torchrun and srun start the same program; ranks come from the environment.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pretrain.config import TrainConfig
from pretrain.data.loader import (
    Batch,
    check_tokenizer,
    open_manifest,
    stream_batches,
    valid_rows,
)
from pretrain.data.tokenizer import Tokenizer
from pretrain.engine.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from pretrain.engine.commit import sweep_temporaries
from pretrain.engine.deepspeed import Engine
from pretrain.engine.world import World, join, leave
from pretrain.errors import (
    EXIT_FINISHED,
    EXIT_SAVED_ON_SIGNAL,
    CheckpointError,
    DivergenceError,
)
from pretrain.loop.lock import RunLock
from pretrain.loop.record import Record
from pretrain.loop.run_folder import (
    begin_life,
    check_run_folder,
    log_to_folder,
    on_all_ranks,
    on_rank_0,
    write_requeue_record,
)
from pretrain.loop.signals import StopSignals
from pretrain.loop.state import TrainState, check_same_data, check_same_tokenizer
from pretrain.loop.steps import Session, training_steps
from pretrain.loop.validation import validate
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel
from pretrain.optim.effective_rate import effective_rates

log = logging.getLogger(__name__)

# A run whose gradients stay non-finite will not mend itself.
MAX_SKIPS_IN_A_ROW = 10


def main(config: TrainConfig) -> int:
    """Train to the end of the run or to a stop signal; returns the exit code.

    Whatever is wrong with configuration, data or run folder is said before the folder changes.
    """
    with StopSignals() as stop:
        world = join(config.engine)
        run_dir = Path(config.run.dir)
        check_run_folder(config, world)
        lock = RunLock(run_dir)
        on_rank_0(world, lock.__enter__)
        try:
            code = _life(config, world, stop, lock)
        finally:
            if world.is_main:
                lock.__exit__(None, None, None)
        # rank 0 finishes the record last; who left before it would look like a failed rank.
        # On an error there is no such meeting: it might wait for a rank that is gone.
        world.barrier()
        leave(world)
        return code


def _life(config: TrainConfig, world: World, stop: StopSignals, lock: RunLock) -> int:
    run_dir = Path(config.run.dir)
    on_rank_0(world, lambda: sweep_temporaries(run_dir))
    inputs = _check_inputs(config, world)
    on_all_ranks(world, lambda: log_to_folder(run_dir, world.rank))
    if inputs.step >= config.total_steps:
        log.info(
            "%s has all its %d steps; give more with run.steps=...", run_dir, config.total_steps
        )
        return EXIT_FINISHED
    on_rank_0(world, lambda: begin_life(config, run_dir))
    session = _open_session(config, world, stop, inputs)
    record = Record(config, run_dir, session.state, rank=world.rank)
    _train(session, inputs.held_out, record, lock)
    is_finished = session.state.step >= config.total_steps
    if world.is_main and not is_finished:
        write_requeue_record(run_dir, session.state.step)
    code = EXIT_FINISHED if is_finished else EXIT_SAVED_ON_SIGNAL
    for path in record.finish(code):
        log.info("plot: %s", path)
    return code


def _train(session: Session, held_out: Batch, record: Record, lock: RunLock) -> None:
    """Drain the steps; validate before saving, so that a saved step has all its record."""
    config = session.config
    for step in training_steps(session):
        record.step(step)
        if session.world.is_main:
            lock.refresh()
        _stop_if_diverged(session.state)
        is_last = step.step == config.total_steps
        is_leaving = is_last or step.should_stop
        if is_last or (not is_leaving and step.step % config.validation.every_steps == 0):
            record.validation(session.state, _validate(session, held_out))
        if is_leaving or step.step % config.checkpoint.every_steps == 0:
            _save(session, record, must=is_leaving)


def _validate(session: Session, held_out: Batch) -> dict[str, Any]:
    """Held-out loss, the health of the recurrence, and how far updates reach."""
    config, engine = session.config, session.engine
    with engine.evaluation() as model:
        result = validate(
            model,
            config,
            session.world,
            held_out,
            depths=config.validation.depths,
            diagnose_depth=config.depth.mean,
        )
    return result | effective_rates(engine.optimizer, engine.layout)


class _Inputs(NamedTuple):
    """What a life starts from, all of it checked."""

    identity: dict[str, str]
    """Hashes of shards and tokenizer, and what was adopted; kept in every checkpoint."""
    held_out: Batch
    """This rank's rows of the valid split."""
    newest: Path | None
    """The checkpoint to resume from."""
    step: int
    """Its step, or 0."""


def _check_inputs(config: TrainConfig, world: World) -> _Inputs:
    """Shards, tokenizer and checkpoint; they must belong together and to this configuration."""
    config.batch.micro_steps(context=config.model.context, ranks=world.size)
    identity, held_out = on_all_ranks(world, lambda: _check_data(config, world))
    newest = newest_checkpoint(Path(config.run.dir), world)
    step = 0
    if newest is not None:
        saved = read_state(newest)
        check_same_tokenizer(saved, identity["tokenizer_sha256"], config.tokenizer.path)
        check_same_data(saved, identity["data_fingerprint"], config.data.shards)
        step = TrainState.from_dict(saved["train"]).step
        identity |= {key: saved[key] for key in ("adopted_from",) if key in saved}
    return _Inputs(identity, held_out, newest, step)


def _check_data(config: TrainConfig, world: World) -> tuple[dict[str, str], Batch]:
    """The identity of shards and tokenizer, and this rank's held-out rows."""
    manifest = open_manifest(config.data)
    tokenizer = Tokenizer.load(config.tokenizer.path)
    check_tokenizer(
        manifest,
        vocabulary_size=config.model.vocabulary_size,
        tokenizer_sha256=tokenizer.sha256,
    )
    held_out = valid_rows(
        config.data, rows=config.validation.rows, rank=world.rank, ranks=world.size
    )
    identity = {"data_fingerprint": manifest.fingerprint, "tokenizer_sha256": tokenizer.sha256}
    return identity, held_out


def _open_session(config: TrainConfig, world: World, stop: StopSignals, inputs: _Inputs) -> Session:
    """Model, engine, data and counters, as the newest checkpoint left them."""
    with torch.device(world.device):
        model = RecurrentModel(config.model)
    if inputs.newest is None:
        initialize(model, mean_depth=config.depth.mean, seed=config.run.seed)
    micro_steps = config.batch.micro_steps(context=config.model.context, ranks=world.size)
    engine = Engine(model, config, world, micro_steps=micro_steps)
    state = TrainState()
    if inputs.newest is not None:
        state = TrainState.from_dict(load_checkpoint(engine, world, inputs.newest)["train"])
        log.info("resumed %s at step %d", inputs.newest.name, state.step)
    state.lives += 1
    batches = stream_batches(
        config.data,
        seed=config.run.seed,
        first_row=state.rows,
        rows_per_step=config.rows_per_step,
        rank=world.rank,
        ranks=world.size,
    )
    return Session(
        config=config,
        world=world,
        engine=engine,
        batches=batches,
        state=state,
        stop=stop,
        identity=inputs.identity,
    )


def _stop_if_diverged(state: TrainState) -> None:
    if state.skipped_in_a_row >= MAX_SKIPS_IN_A_ROW:
        raise DivergenceError(
            f"The gradient was not finite for {state.skipped_in_a_row} steps in a row, up to step "
            f"{state.step}; no update was made in them. Lower optimizer.learning_rate and resume "
            "from the last checkpoint."
        )


def _save(session: Session, record: Record, *, must: bool) -> None:
    """Save; a failed save in mid-run is reported and survived, the last one is not."""
    record.sync()
    run_dir = Path(session.config.run.dir)
    state = {"train": session.state.as_dict(), **session.identity}
    try:
        path = save_checkpoint(
            session.engine, session.world, run_dir, step=session.state.step, state=state
        )
        log.info("saved %s", path)
    except CheckpointError as error:
        if must:
            raise
        log.error("training goes on without this save: %s", error)
        return
    if session.world.is_main:
        try:
            prune_checkpoints(run_dir, session.config.checkpoint, saved=path)
        except OSError as error:
            log.error("an old checkpoint could not be deleted: %s", error)
