"""Training as a generator of steps; whoever drains it logs, validates, saves and stops.

The loss of a step is the sum of nats over the step's valid tokens on all ranks, divided by their
number, so neither the ranks nor the accumulation nor padding weigh a token differently.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch

from pretrain.config import TrainConfig
from pretrain.data.loader import Batch
from pretrain.data.order import Order
from pretrain.engine.deepspeed import Engine, StepResult
from pretrain.engine.saving import Saver
from pretrain.engine.world import World
from pretrain.loop import spikes
from pretrain.loop.control import Control
from pretrain.loop.host_memory import HostMemory
from pretrain.loop.lost_rows import note_lost_rows
from pretrain.loop.micro_batches import labels_of, micro_batches, row_checksum
from pretrain.loop.passed_over import Rewind, row_after
from pretrain.loop.peak import peak_flops
from pretrain.loop.phases import PhaseClock
from pretrain.loop.sensors import Sensors, sensor_metrics
from pretrain.loop.signals import StopSignals
from pretrain.loop.state import TrainState, last_step, total_tokens
from pretrain.loop.step_metrics import (
    depth_metrics,
    source_metrics,
    speed_metrics,
    split_metrics,
)
from pretrain.loop.stragglers import Stragglers
from pretrain.loop.watchdog import Watchdog
from pretrain.model.depth import Depth, step_depths
from pretrain.model.loss import IGNORED
from pretrain.optim.schedule import learning_rate


@dataclass(slots=True)
class Session:
    """What one life of a run holds."""

    config: TrainConfig
    world: World
    engine: Engine
    saver: Saver
    stream: Callable[[int], Iterator[Batch]]
    """This rank's rows of each step from a global row on."""
    order: Order
    """Which source each global row is of."""
    state: TrainState
    stop: StopSignals
    control: Control
    watch: Watchdog
    stragglers: Stragglers
    memory: HostMemory
    sensors: Sensors
    identity: dict[str, str]
    """Hashes of shards and tokenizer; kept in every checkpoint."""
    rewinds: list[Rewind] = field(default_factory=list)
    """Rows to go past."""
    batches: Iterator[Batch] | None = None
    clock: PhaseClock = field(init=False)
    peak: float = field(init=False)
    """FLOP/s that a rank's device could reach."""

    def __post_init__(self) -> None:
        self.clock = PhaseClock(self.world.device)
        # so that waiting is not taken for a backward pass
        self.engine.before_waiting = partial(self.clock.enter, "reduce")
        self.peak = peak_flops(self.config, self.world.device)

    def enter(self, phase: str) -> None:
        """Tell watchdog and clock what the step does from here on."""
        self.watch.enter(self.state.step + 1, phase)
        self.clock.enter(phase)

    def next_batch(self) -> Batch:
        """This rank's rows of the next step."""
        row = row_after(self.rewinds, self.state.rows)
        if _changes_mixture(self.config, range(self.state.rows, row + self.config.rows_per_step)):
            # another mixture has another loss: nothing to compare it with
            self.state.good_losses.clear()
        if self.batches is None or row != self.state.rows:
            self.forget_batches()
            self.state.rows = row
            self.batches = self.stream(row)
        return next(self.batches)

    def forget_batches(self) -> None:
        """Read anew from wherever the state then is."""
        if self.batches is not None:
            # generators, whose workers end with them
            self.batches.close()  # type: ignore[attr-defined]
        self.batches = None


class _Sums(NamedTuple):
    """What the ranks add up once per step, before the update."""

    nats: float
    checksum: float
    waited_s: float
    forward_s: float
    backward_s: float
    lost: float
    writing: float
    stopping: float
    saving: float
    pausing: float


class StepRecord(NamedTuple):
    """One finished step."""

    step: int
    tokens: int
    metrics: dict[str, Any]
    """Reduced over ranks; keys like loss/nats, numbers and lists of numbers."""
    should_stop: bool
    """A rank has been told to save and leave, or control/stop is there."""
    should_save: bool
    """control/save is there."""
    should_pause: bool
    """control/pause is there."""
    has_written: bool
    """No rank is still writing a checkpoint."""


def training_steps(session: Session) -> Iterator[StepRecord]:
    """Steps until the run's end or a stop signal; every rank sees the same records."""
    while session.state.step < last_step(session.config, session.state):
        record = _step(session)
        yield record
        if record.should_stop:
            return


def _step(session: Session) -> StepRecord:
    config, world, state = session.config, session.world, session.state
    started = time.monotonic()
    session.clock.begin()
    session.enter("data")
    batch = session.next_batch()
    waited_s = time.monotonic() - started
    first_row, rate = state.rows, _learning_rate(config, state)
    depths = step_depths(
        config.depth, seed=config.run.seed, first_row=first_row, rows=config.rows_per_step
    )
    own = depths[batch.first_row - first_row :][: len(batch.tokens_BS)]
    num_labels = int((labels_of(batch, config.model.documents) != IGNORED).sum())
    session.enter("count")
    (all_labels,) = world.sum([num_labels])
    nats = _forward_and_backward(session, batch, own, scale=1 / max(all_labels, 1.0))
    session.enter("reduce")
    spent = session.clock.seconds()
    sums, felt = _sum(session, nats=nats, batch=batch, waited_s=waited_s, spent=spent)
    met_s = time.monotonic() - started
    if sums.lost:
        note_lost_rows(config, world, state, batch)
    loss = sums.nats / max(all_labels, 1.0)
    verdict = spikes.judge(state, loss, config.guards.spike)
    session.enter("update")
    result = session.engine.step(
        rate,
        drops_update=verdict.drops_update,
        measures_parts=_is_due(config.logging.part_norms_every_steps, state.step + 1),
    )
    step_s = time.monotonic() - started
    session.enter("after")
    spikes.note(state, loss, verdict, config.guards.spike)
    _advance(state, config, loss, verdict, result, step_s=step_s)
    metrics = {
        "loss/nats": loss,
        "loss/spike_score": verdict.score,
        "loss/spikes": state.spikes,
        "gradient/norm": result.grad_norm,
        **result.part_norms,
        "optimizer/learning_rate": rate,
        "optimizer/skipped_updates": state.skipped_updates,
        "data/first_row": first_row,
        "data/rows": config.rows_per_step,
        "data/checksum": sums.checksum,
        "data/valid_tokens": all_labels,
        "data/lost_rows": state.lost_rows,
        **_plan_metrics(session, depths, first_row=first_row, step_s=step_s),
        **_time_metrics(sums, world, met_s=met_s, step_s=step_s),
        **session.stragglers.add(
            own_s=waited_s + spent["forward"], iterations=sum(depth.total for depth in own)
        ),
        "memory/host_bytes": session.memory.measure(),
        **_device_memory(world),
        **sensor_metrics(felt),
    }
    return _record(state, metrics, sums)


def _plan_metrics(
    session: Session, depths: list[Depth], *, first_row: int, step_s: float
) -> dict[str, Any]:
    """What the step's number says of its rows, and how fast they went."""
    config, ranks = session.config, session.world.size
    return {
        **source_metrics(session.order, first_row=first_row, rows=config.rows_per_step),
        **depth_metrics(depths, ranks=ranks),
        **speed_metrics(config, depths, step_s=step_s, ranks=ranks, peak=session.peak),
    }


def _time_metrics(sums: _Sums, world: World, *, met_s: float, step_s: float) -> dict[str, float]:
    return split_metrics(
        data_s=sums.waited_s / world.size,
        forward_s=sums.forward_s / world.size,
        backward_s=sums.backward_s / world.size,
        met_s=met_s,
        step_s=step_s,
    )


def _record(state: TrainState, metrics: dict[str, Any], sums: _Sums) -> StepRecord:
    return StepRecord(
        state.step,
        state.tokens,
        metrics,
        should_stop=sums.stopping > 0,
        should_save=sums.saving > 0,
        should_pause=sums.pausing > 0,
        has_written=sums.writing == 0,
    )


def _sum(
    session: Session, *, nats: float, batch: Batch, waited_s: float, spent: Mapping[str, float]
) -> tuple[_Sums, list[float]]:
    """The sum over ranks before the update; wishes and sensors ride along with the loss."""
    asked = session.control.poll()
    is_stopping = asked.stop or session.stop.received is not None
    own = _Sums(
        nats=nats,
        checksum=row_checksum(batch),
        waited_s=waited_s,
        forward_s=spent["forward"],
        backward_s=spent["backward"],
        lost=len(batch.lost),
        writing=session.saver.is_writing,
        stopping=is_stopping,
        saving=asked.save,
        pausing=asked.pause,
    )
    sums = session.world.sum([*own, *session.sensors.take()])
    return _Sums(*sums[: len(own)]), sums[len(own) :]


def _changes_mixture(config: TrainConfig, rows: range) -> bool:
    """Whether a milestone of the data begins among rows of a step, or those gone past before it."""
    return any(m.first_row(config.data.context) in rows for m in config.data.milestones)


def _learning_rate(config: TrainConfig, state: TrainState) -> float:
    return learning_rate(
        state.tokens,
        step_tokens=config.batch.global_tokens,
        total_tokens=total_tokens(config, state),
        peak=config.optimizer.learning_rate,
        config=config.schedule,
    )


def _forward_and_backward(
    session: Session, batch: Batch, depths: list[Depth], *, scale: float
) -> float:
    """Gradients of scale * nats over this rank's rows; returns the nats."""
    config, engine = session.config, session.engine
    nats = torch.zeros((), dtype=torch.float64, device=session.world.device)
    session.enter("forward")
    micros = micro_batches(
        batch,
        depths,
        model=config.model,
        micro_rows=config.batch.micro_rows,
        seed=config.run.seed,
        device=session.world.device,
    )
    with engine.accumulation():
        for micro in micros:
            output = engine(
                micro.tokens_BT,
                micro.depths,
                initial_state=micro.initial_state_BTD,
                labels=micro.labels_BT,
                documents=micro.documents_BT,
                digit_shift=micro.digit_shift_B,
                keep_logits=False,
            )
            assert output.nats is not None
            session.enter("backward")
            engine.backward(output.nats, scale=scale)
            nats += output.nats.detach().double()
            session.enter("forward")
    return float(nats)


def _is_due(every_steps: int, step: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def _advance(
    state: TrainState,
    config: TrainConfig,
    loss_nats: float,
    verdict: spikes.Verdict,
    result: StepResult,
    *,
    step_s: float,
) -> None:
    is_finite = math.isfinite(loss_nats) and math.isfinite(result.grad_norm)
    state.step += 1
    state.rows += config.rows_per_step
    state.tokens += config.batch.global_tokens
    state.trained_s += step_s
    state.skipped_updates += not result.is_applied
    state.skipped_in_a_row = 0 if result.is_applied else state.skipped_in_a_row + 1
    state.not_finite_in_a_row = 0 if is_finite else state.not_finite_in_a_row + 1
    is_bad = verdict.is_spike or not result.is_applied
    state.bad_in_a_row = state.bad_in_a_row + 1 if is_bad else 0


def _device_memory(world: World) -> dict[str, float]:
    if world.device.type != "cuda":
        return {}
    return {"memory/peak_bytes": torch.cuda.max_memory_allocated(world.device)}
