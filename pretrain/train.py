"""The command `pretrain train`: one life of a run, from its newest checkpoint to its end.

One process, torchrun and srun start the same program; ranks come from the environment.
"""

import logging
from pathlib import Path
from typing import Any

import torch

from pretrain.config import TrainConfig
from pretrain.data.loader import check_tokenizer, open_manifest, stream_batches
from pretrain.data.tokenizer import Tokenizer
from pretrain.engine.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from pretrain.engine.commit import sweep_temporaries
from pretrain.engine.deepspeed import Engine
from pretrain.engine.world import World, join, leave
from pretrain.errors import (
    EXIT_FINISHED,
    EXIT_SAVED_ON_SIGNAL,
    CheckpointError,
    DataError,
    DivergenceError,
)
from pretrain.loop.lock import RunLock
from pretrain.loop.record import Record
from pretrain.loop.run_folder import (
    log_to_folder,
    on_rank_0,
    prepare_run_folder,
    write_requeue_record,
)
from pretrain.loop.signals import StopSignals
from pretrain.loop.state import TrainState
from pretrain.loop.steps import Session, training_steps
from pretrain.loop.validation import validate
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel

log = logging.getLogger(__name__)

# A run whose gradients stay non-finite will not mend itself.
MAX_SKIPS_IN_A_ROW = 10


def main(config: TrainConfig) -> int:
    """Train to the end of the run or to a stop signal; returns the exit code."""
    with StopSignals() as stop:
        world = join(config.engine)
        run_dir = prepare_run_folder(config, world)
        log_to_folder(run_dir, world.rank)
        lock = RunLock(run_dir)
        on_rank_0(world, lock.__enter__)
        try:
            code = _life(config, world, run_dir, stop, lock)
        finally:
            if world.rank == 0:
                lock.__exit__(None, None, None)
        # on an error there is no such meeting: a collective might wait for a rank that is gone
        leave(world)
        return code


def _life(
    config: TrainConfig, world: World, run_dir: Path, stop: StopSignals, lock: RunLock
) -> int:
    session = _open_session(config, world, run_dir, stop)
    record = Record(config, run_dir, session.state, rank=world.rank)
    state, checkpoint, validation = session.state, config.checkpoint, config.validation
    is_stopped = False
    saved_step = validated_step = state.step if state.lives > 1 else -1
    for step in training_steps(session):
        record.step(step)
        if world.rank == 0:
            lock.refresh()
        _stop_if_diverged(state)
        is_stopped = step.should_stop
        if not is_stopped and step.step % validation.every_steps == 0:
            _validate(session, record)
            validated_step = step.step
        if step.step % checkpoint.every_steps == 0:
            _save(session, run_dir, record, must=False)
            saved_step = step.step
    if saved_step != state.step:
        _save(session, run_dir, record, must=True)
    if is_stopped and state.step < config.total_steps:
        if world.rank == 0:
            write_requeue_record(run_dir, state.step)
        record.finish()
        return EXIT_SAVED_ON_SIGNAL
    if validated_step != state.step:
        _validate(session, record)
    for path in record.finish():
        log.info("plot: %s", path)
    return EXIT_FINISHED


def _open_session(config: TrainConfig, world: World, run_dir: Path, stop: StopSignals) -> Session:
    """Model, engine, data and counters, as the newest checkpoint left them."""
    manifest = open_manifest(config.data)
    check_tokenizer(
        manifest,
        vocabulary_size=config.model.vocabulary_size,
        tokenizer_sha256=Tokenizer.load(config.tokenizer.path).sha256,
    )
    micro_steps = config.batch.micro_steps(context=config.model.context, ranks=world.size)
    on_rank_0(world, lambda: sweep_temporaries(run_dir))
    with torch.device(world.device):
        model = RecurrentModel(config.model)
    newest = newest_checkpoint(run_dir, world)
    if newest is None:
        initialize(model, mean_depth=config.depth.mean, seed=config.run.seed)
    engine = Engine(model, config, world, micro_steps=micro_steps)
    state = TrainState()
    if newest is not None:
        saved = load_checkpoint(engine, world, newest)
        _check_same_data(saved, manifest.fingerprint, config.data.shards)
        state = TrainState.from_dict(saved["train"])
        log.info("resumed %s at step %d", newest.name, state.step)
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
        fingerprint=manifest.fingerprint,
    )


def _check_same_data(saved: dict[str, Any], fingerprint: str, shards: str) -> None:
    if saved["data_fingerprint"] != fingerprint:
        raise DataError(
            f"The run has trained on data {saved['data_fingerprint'][:12]}, but {shards} holds "
            f"{fingerprint[:12]}: rows would be lost or repeated. Give the run its own shards "
            "back (data.shards=...), or start another run."
        )


def _stop_if_diverged(state: TrainState) -> None:
    if state.skipped_in_a_row >= MAX_SKIPS_IN_A_ROW:
        raise DivergenceError(
            f"The gradient was not finite for {state.skipped_in_a_row} steps in a row, up to step "
            f"{state.step}; no update was made in them. Lower optimizer.learning_rate and resume "
            "from the last checkpoint."
        )


def _validate(session: Session, record: Record) -> None:
    config = session.config
    with session.engine.evaluation() as model:
        result = validate(
            model,
            config,
            session.world,
            depths=config.validation.depths,
            rows=config.validation.rows,
        )
    record.validation(session.state, result)


def _save(session: Session, run_dir: Path, record: Record, *, must: bool) -> None:
    """Save; a failed save in mid-run is reported and survived, the last one is not."""
    record.sync()
    state = {"train": session.state.as_dict(), "data_fingerprint": session.fingerprint}
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
    if session.world.rank == 0:
        prune_checkpoints(run_dir, session.config.checkpoint, saved=path)
