"""The command `pretrain train`: one life of a run, from its newest checkpoint to its end.

One process, torchrun and srun start the same program; ranks come from the environment.
"""

import logging
import shlex
import shutil
import time
from collections.abc import Iterator
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
from pretrain.data.order import Order
from pretrain.data.store import check_epochs, train_order
from pretrain.data.tokenizer import Tokenizer
from pretrain.engine.checkpoint import (
    load_checkpoint,
    newest_checkpoint,
    read_state,
    set_later_aside,
)
from pretrain.engine.commit import sweep_temporaries
from pretrain.engine.deepspeed import Engine
from pretrain.engine.memory import checkpoint_bytes
from pretrain.engine.saving import Saver
from pretrain.engine.world import World, join, leave
from pretrain.errors import (
    EXIT_FINISHED,
    EXIT_SAVED_ON_SIGNAL,
    CheckpointError,
    ConfigError,
    DivergenceError,
)
from pretrain.jobs.queue import has_ended
from pretrain.jobs.snapshot import code_origin
from pretrain.loop.control import Control
from pretrain.loop.guard_config import GuardConfig
from pretrain.loop.host_memory import HostMemory
from pretrain.loop.lineage import FINISHED, STALLED, STOPPED, Lineage
from pretrain.loop.lock import RunLock
from pretrain.loop.origin import origin
from pretrain.loop.outcome import check_last_steps, check_weights
from pretrain.loop.passed_over import Rewind, read_rewinds, windows
from pretrain.loop.record import Record
from pretrain.loop.rewind import rewind
from pretrain.loop.run_folder import (
    begin_life,
    check_run_folder,
    log_to_folder,
    on_all_ranks,
    on_rank_0,
    write_requeue_record,
)
from pretrain.loop.samples import Sampler
from pretrain.loop.saves import Saves, tag_earlier
from pretrain.loop.sensors import Reading, Sensors
from pretrain.loop.signals import StopSignals
from pretrain.loop.spikes import must_rewind
from pretrain.loop.state import (
    TrainState,
    check_same_data,
    check_same_on_all_ranks,
    check_same_tokenizer,
    last_step,
    total_rows,
    total_tokens,
)
from pretrain.loop.steps import Session, training_steps
from pretrain.loop.stragglers import Stragglers
from pretrain.loop.trained import find_digits
from pretrain.loop.validation import validate
from pretrain.loop.watchdog import Watchdog
from pretrain.model.init import initialize
from pretrain.model.recurrent import RecurrentModel
from pretrain.optim.effective_rate import effective_rates
from pretrain.optim.schedule import reaches_peak
from pretrain.preflight.nvml import read_sensors
from pretrain.preflight.versions import environment

log = logging.getLogger(__name__)


class _Inputs(NamedTuple):
    """What a life starts from, all of it checked."""

    identity: dict[str, str]
    """Hashes of shards and tokenizer, and what was adopted; kept in every checkpoint."""
    held_out: Batch
    """This rank's rows of the valid split."""
    order: Order
    """Where every row of the run comes from."""
    sampler: Sampler
    """What continues the prompts of a validation."""
    newest: Path | None
    """The checkpoint to resume from."""
    state: TrainState
    """How far it was."""
    rewinds: list[Rewind]
    """Rows that the run goes past."""
    digit_ids: tuple[int, ...]
    """Tokens that are digits; empty where these have no places."""


def main(config: TrainConfig) -> int:
    """Train to the end of the run or to a stop signal; returns the exit code.

    Whatever is wrong with configuration, data or run folder is said before the folder changes.
    """
    with StopSignals() as stop:
        world = join(config.engine)
        run_dir = Path(config.run.dir)
        check_run_folder(config, world)
        lock = RunLock(run_dir, has_ended=has_ended)
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
    if inputs.newest is not None:
        newest = inputs.newest
        on_rank_0(world, lambda: set_later_aside(run_dir, newest))
    on_rank_0(world, lambda: tag_earlier(config, reached=inputs.state.step))
    if inputs.state.step >= last_step(config, inputs.state):
        check_last_steps(inputs.state)
        log.info(
            "%s has all its %d steps; give more with run.steps=...", run_dir, inputs.state.step
        )
        return EXIT_FINISHED
    control = Control(run_dir, world)
    if control.is_stopped():
        log.warning(
            "%s stays at step %d: control/stop is there; remove it to go on",
            run_dir,
            inputs.state.step,
        )
        return EXIT_SAVED_ON_SIGNAL
    on_rank_0(world, control.open)
    on_rank_0(world, lambda: begin_life(config, run_dir))
    if world.is_main:
        _warn_of_schedules(config, inputs.state)
    tags = config.checkpoint.tags
    lineage = Lineage(run_dir, world, first_step=inputs.state.step, tags=tags, fence=lock.refresh)
    records: list[Record] = []

    def stalled() -> None:
        lineage.end(STALLED)
        for record in records:
            record.stalled(lineage.last_step)

    watch = Watchdog(world, run_dir, limit_s=config.guards.stall_s, at_end=stalled)
    sensors = Sensors(lambda: _feel(world.device), every_s=config.logging.sensors_every_s)
    with lineage, watch, sensors:
        session = _open_session(config, world, stop, inputs, lock, watch, control, sensors)
        code = code_origin() if world.is_main else {}
        found = origin(code, inputs.identity, environment(world))
        record = Record(config, run_dir, session.state, rank=world.rank, origin=found)
        records.append(record)
        _train(session, inputs, record, lock, lineage)
        session.forget_batches()
        lineage.reason = _reason_to_leave(session)
    exit_code = EXIT_FINISHED if lineage.reason == FINISHED else EXIT_SAVED_ON_SIGNAL
    is_interrupted = lineage.reason not in (FINISHED, STOPPED)
    if world.is_main and is_interrupted:
        write_requeue_record(run_dir, session.state.step)
        record.requeued(session.state, lineage.reason)
    for path in record.finish(exit_code):
        log.info("plot: %s", path)
    if is_interrupted:
        log.info("to go on: pretrain train run.dir=%s", shlex.quote(str(run_dir)))
    return exit_code


def _warn_of_schedules(config: TrainConfig, state: TrainState) -> None:
    tokens, schedule = total_tokens(config, state), config.schedule
    step_tokens = config.batch.global_tokens
    if not reaches_peak(step_tokens=step_tokens, total_tokens=tokens, config=schedule):
        log.warning(
            "the run's %s tokens are fewer than schedule.warmup_tokens=%s and "
            "schedule.cooldown_tokens=%s together: the rate falls before it has reached "
            "optimizer.learning_rate=%g. Shorten them, or train longer.",
            f"{tokens:,}", f"{schedule.warmup_tokens:,}", f"{schedule.cooldown_tokens:,}",
            config.optimizer.learning_rate,
        )  # fmt: skip
    rows = tokens // config.model.context
    if config.depth.ramp_rows > rows:
        log.warning(
            "the run's %s rows are fewer than depth.ramp_rows=%s: the mean depth never reaches "
            "depth.mean=%d. Shorten the curriculum, or train longer.",
            f"{rows:,}", f"{config.depth.ramp_rows:,}", config.depth.mean,
        )  # fmt: skip


def _reason_to_leave(session: Session) -> str:
    """For the lineage, as rank 0 saw it: another rank's signal may have come first."""
    if session.state.step >= last_step(session.config, session.state):
        return FINISHED
    if session.control.last.stop:
        return STOPPED
    return session.stop.received.name if session.stop.received else "a signal to another rank"


def _train(
    session: Session, inputs: _Inputs, record: Record, lock: RunLock, lineage: Lineage
) -> None:
    """Drain the steps; validate before saving, so that a saved step has all its record."""
    config, guards = session.config, session.config.guards
    saves = Saves(session, record)
    if must_rewind(session.state, guards.spike):
        # the life before was told to stop when it was about to
        rewind(session, record, saves)
    for step in training_steps(session):
        # first: whoever has lost the folder writes nothing more
        if session.world.is_main:
            _refresh(lock, session)
        record.step(step)
        lineage.last_step = step.step
        _stop_if_diverged(session.state, guards, saves)
        is_last = step.step == last_step(config, session.state)
        is_leaving = is_last or step.should_stop
        is_bad = must_rewind(session.state, guards.spike) and not is_leaving
        if is_bad and rewind(session, record, saves):
            continue
        if is_last or (not is_leaving and step.step % config.validation.every_steps == 0):
            session.watch.enter(step.step, "validation")
            result = _validate(session, inputs)
            record.validation(session.state, result)
            if is_last:
                # what is on its way is from before
                saves.finish()
                check_weights(session.state, result["validation/loss_at_mean_nats"])
        session.watch.enter(step.step, "save")
        saves.after_step(step, is_leaving=is_leaving)
        if is_last:
            check_last_steps(session.state)
        if step.should_pause and not is_leaving:
            # nobody knows for how long: what is on its way is safe, and whoever asked for it hears
            saves.finish()
            _pause(session, lock)


def _pause(session: Session, lock: RunLock) -> None:
    """Wait at this step boundary for as long as control/pause is there."""

    def heartbeat() -> None:
        session.watch.enter(session.state.step, "pause")
        if session.world.is_main:
            _refresh(lock, session)

    session.control.wait_while_paused(
        is_interrupted=lambda: session.stop.received is not None, heartbeat=heartbeat
    )


def _refresh(lock: RunLock, session: Session) -> None:
    try:
        lock.refresh()
    except CheckpointError:
        session.saver.forsake()
        raise


def _validate(session: Session, inputs: _Inputs) -> dict[str, Any]:
    """Held-out loss, the health of the recurrence, how far updates reach, samples, and seconds."""
    config, engine, world = session.config, session.engine, session.world
    started = time.monotonic()
    with engine.evaluation() as model:
        result = validate(
            model,
            config,
            world,
            inputs.held_out,
            depths=config.validation.depths,
            diagnose_depth=config.depth.mean,
        )
        measured = time.monotonic()
        session.watch.enter(session.state.step, "samples")
        result |= inputs.sampler.take(model, step=session.state.step, device=world.device)
    result["time/validation_s"] = measured - started
    result["time/samples_s"] = time.monotonic() - measured
    return result | effective_rates(engine.optimizer, engine.layout)


def _check_inputs(config: TrainConfig, world: World) -> _Inputs:
    """Shards, tokenizer and checkpoint; they must belong together and to this configuration."""
    config.batch.micro_steps(context=config.model.context, ranks=world.size)
    identity, held_out, order, sampler = on_all_ranks(world, lambda: _check_data(config, world))
    check_same_on_all_ranks(world.gather_objects(identity))
    digits = on_all_ranks(world, lambda: find_digits(config))
    run_dir = Path(config.run.dir)
    rewinds = world.broadcast_object(
        on_all_ranks(world, lambda: read_rewinds(run_dir) if world.is_main else [])
    )
    newest = newest_checkpoint(run_dir, world)
    state = TrainState()
    if newest is None:
        on_rank_0(world, lambda: _check_space(config, run_dir))
    else:
        saved = read_state(newest)
        check_same_tokenizer(saved, identity["tokenizer_sha256"], config.tokenizer.path)
        check_same_data(saved, identity["data_fingerprint"], config.data.shards)
        state = TrainState.from_dict(saved["train"])
        identity |= {key: saved[key] for key in ("adopted_from",) if key in saved}
    # rows that the run went past were taken back; the life that did so was not stopped for them
    passed = windows(rewinds, before=state.rows)
    on_all_ranks(
        world,
        lambda: check_epochs(config.data, order, total_rows(config, state), without=passed),
    )
    return _Inputs(identity, held_out, order, sampler, newest, state, rewinds, digits)


def _check_space(config: TrainConfig, run_dir: Path) -> None:
    """Refuse to start what could never save; warn of what will run full."""
    one, free = checkpoint_bytes(config.model), shutil.disk_usage(run_dir).free
    kept = config.checkpoint.keep_last + 1
    remedy = "Free some, choose another run.dir, or lower checkpoint.keep_last."
    if free < one:
        raise ConfigError(
            f"run.dir={run_dir} has {free:,} bytes free; one checkpoint needs {one:,}. {remedy}"
        )
    if free < kept * one:
        log.warning(
            "%s has %s bytes free; %d checkpoints of %s, one of them in the making, need more. %s",
            run_dir, f"{free:,}", kept, f"{one:,}", remedy,
        )  # fmt: skip


def _check_data(config: TrainConfig, world: World) -> tuple[dict[str, str], Batch, Order, Sampler]:
    """The identity of shards and tokenizer, this rank's held-out rows, the order of rows, and what
    samples are of.
    """
    manifest = open_manifest(config.data)
    tokenizer = Tokenizer.load(config.tokenizer.path)
    check_tokenizer(
        manifest,
        vocabulary_size=config.model.vocabulary_size,
        tokenizer_sha256=tokenizer.sha256,
    )
    order = train_order(config.data, manifest, config.run.seed)
    held_out = valid_rows(
        config.data, rows=config.validation.rows, rank=world.rank, ranks=world.size
    )
    identity = {"data_fingerprint": manifest.fingerprint, "tokenizer_sha256": tokenizer.sha256}
    return identity, held_out, order, Sampler(config, tokenizer)


def _feel(device: torch.device) -> Reading | None:
    """The sensors of this rank's GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    return read_sensors(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def _open_session(
    config: TrainConfig,
    world: World,
    stop: StopSignals,
    inputs: _Inputs,
    lock: RunLock,
    watch: Watchdog,
    control: Control,
    sensors: Sensors,
) -> Session:
    """Model, engine, data and counters, as the newest checkpoint left them."""
    run_dir = Path(config.run.dir)
    with torch.device(world.device):
        model = RecurrentModel(config.model)
    if inputs.newest is None:
        initialize(model, mean_depth=config.depth.mean, seed=config.run.seed)
    if model.digit_embedding is not None:
        model.digit_embedding.tell_digits(inputs.digit_ids)
    micro_steps = config.batch.micro_steps(context=config.model.context, ranks=world.size)
    engine = Engine(model, config, world, micro_steps=micro_steps)
    state = TrainState()
    if inputs.newest is not None:
        state = TrainState.from_dict(load_checkpoint(engine, world, inputs.newest)["train"])
        log.info("resumed %s at step %d", inputs.newest.name, state.step)
    state.lives += 1

    def stream(first_row: int) -> Iterator[Batch]:
        return stream_batches(
            config.data,
            seed=config.run.seed,
            first_row=first_row,
            rows_per_step=config.rows_per_step,
            rank=world.rank,
            ranks=world.size,
        )

    return Session(
        config=config,
        world=world,
        engine=engine,
        saver=Saver(
            engine,
            world,
            run_dir,
            asynchronous=config.checkpoint.asynchronous,
            fence=lock.refresh,
        ),
        stream=stream,
        order=inputs.order,
        state=state,
        stop=stop,
        control=control,
        watch=watch,
        stragglers=Stragglers(world, config.guards),
        sensors=sensors,
        memory=HostMemory(world.rank, limit_bytes=config.guards.host_growth_bytes),
        identity=inputs.identity,
        rewinds=inputs.rewinds,
    )


def _stop_if_diverged(state: TrainState, guards: GuardConfig, saves: Saves) -> None:
    if state.skipped_in_a_row >= guards.stop_after_skips:
        # what to look into may be on its way
        saves.finish()
        raise DivergenceError(
            f"{state.skipped_in_a_row} steps in a row had no update, up to step {state.step}: "
            "their gradients were not finite or their losses far off. Lower "
            "optimizer.learning_rate and resume from the last checkpoint; `pretrain replay` shows "
            "the rows."
        )
