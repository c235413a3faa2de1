"""Training as a generator of steps; whoever drains it logs, validates, saves and stops.

The loss of a step is the sum of nats over the step's valid tokens on all ranks, divided by their
number, so neither the ranks nor the accumulation nor padding weigh a token differently.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from pretrain.config import TrainConfig
from pretrain.data.loader import Batch
from pretrain.engine.deepspeed import Engine
from pretrain.engine.saving import Saver
from pretrain.engine.world import World
from pretrain.loop import spikes
from pretrain.loop.control import Control
from pretrain.loop.host_memory import HostMemory
from pretrain.loop.lost_rows import note_lost_rows
from pretrain.loop.micro_batches import labels_of, micro_batches, row_checksum
from pretrain.loop.passed_over import Rewind, row_after
from pretrain.loop.signals import StopSignals
from pretrain.loop.state import TrainState, last_step, total_tokens
from pretrain.loop.stragglers import Stragglers
from pretrain.loop.watchdog import Watchdog
from pretrain.model.cost import TokenFlops
from pretrain.model.depth import WITH_GRAD_COST, Depth, step_depths
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
    state: TrainState
    stop: StopSignals
    control: Control
    watch: Watchdog
    stragglers: Stragglers
    memory: HostMemory
    identity: dict[str, str]
    """Hashes of shards and tokenizer; kept in every checkpoint."""
    rewinds: list[Rewind] = field(default_factory=list)
    """Rows to go past."""
    batches: Iterator[Batch] | None = None

    def next_batch(self) -> Batch:
        """This rank's rows of the next step."""
        row = row_after(self.rewinds, self.state.rows)
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
    lost: float
    writing: float
    stopping: float
    saving: float
    pausing: float


class StepRecord(NamedTuple):
    """One finished step."""

    step: int
    tokens: int
    metrics: dict[str, float]
    """Reduced over ranks; keys like loss/nats."""
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
    watch, number = session.watch, state.step + 1
    started = time.monotonic()
    watch.enter(number, "data")
    batch = session.next_batch()
    waited_s = time.monotonic() - started
    first_row, rate = state.rows, _learning_rate(config, state)
    depths = step_depths(
        config.depth, seed=config.run.seed, first_row=first_row, rows=config.rows_per_step
    )
    own = depths[batch.first_row - first_row :][: len(batch.tokens_BS)]
    num_labels = int((labels_of(batch, config.model.documents) != IGNORED).sum())
    watch.enter(number, "count")
    (all_labels,) = world.sum([num_labels])
    counted = time.monotonic()
    nats = _forward_and_backward(session, batch, own, scale=1 / max(all_labels, 1.0))
    own_s = waited_s + time.monotonic() - counted
    watch.enter(number, "reduce")
    sums = _sum(session, nats=nats, batch=batch, waited_s=waited_s)
    if sums.lost:
        note_lost_rows(config, world, state, batch)
    loss = sums.nats / max(all_labels, 1.0)
    if _changes_mixture(config, first_row):
        # another mixture has another loss: nothing to compare it with
        state.good_losses.clear()
    verdict = spikes.judge(state, loss, config.guards.spike)
    watch.enter(number, "update")
    result = session.engine.step(rate, drops_update=verdict.drops_update)
    step_s = time.monotonic() - started
    watch.enter(number, "after")
    spikes.note(state, loss, verdict, config.guards.spike)
    _advance(state, config, is_spike=verdict.is_spike, is_applied=result.is_applied, step_s=step_s)
    metrics = {
        "loss/nats": loss,
        "loss/spike_score": verdict.score,
        "loss/spikes": state.spikes,
        "gradient/norm": result.grad_norm,
        "optimizer/learning_rate": rate,
        "optimizer/skipped_updates": state.skipped_updates,
        "data/first_row": first_row,
        "data/rows": config.rows_per_step,
        "data/checksum": sums.checksum,
        "data/valid_tokens": all_labels,
        "data/wait_s": sums.waited_s / world.size,
        "data/lost_rows": state.lost_rows,
        **_depth_metrics(depths),
        **_speed_metrics(config, world, depths, step_s),
        **session.stragglers.add(own_s=own_s, work=_work(own)),
        "memory/host_bytes": session.memory.measure(),
    }
    return StepRecord(
        state.step,
        state.tokens,
        metrics,
        should_stop=sums.stopping > 0,
        should_save=sums.saving > 0,
        should_pause=sums.pausing > 0,
        has_written=sums.writing == 0,
    )


def _sum(session: Session, *, nats: float, batch: Batch, waited_s: float) -> _Sums:
    """The one sum over ranks of a step; wishes ride along with the loss."""
    asked = session.control.poll()
    is_stopping = asked.stop or session.stop.received is not None
    own = _Sums(
        nats,
        row_checksum(batch),
        waited_s,
        len(batch.lost),
        session.saver.is_writing,
        is_stopping,
        asked.save,
        asked.pause,
    )
    return _Sums(*session.world.sum(list(own)))


def _changes_mixture(config: TrainConfig, first_row: int) -> bool:
    """Whether a milestone of the data begins in the step."""
    rows = range(first_row, first_row + config.rows_per_step)
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
    number = session.state.step + 1
    for micro in micro_batches(
        batch,
        depths,
        model=config.model,
        micro_rows=config.batch.micro_rows,
        seed=config.run.seed,
        device=session.world.device,
    ):
        session.watch.enter(number, "forward")
        output = engine(
            micro.tokens_BT,
            micro.depths,
            initial_state=micro.initial_state_BTD,
            labels=micro.labels_BT,
            documents=micro.documents_BT,
            keep_logits=False,
        )
        assert output.nats is not None
        session.watch.enter(number, "backward")
        engine.backward(output.nats, scale=scale)
        nats += output.nats.detach().double()
    return float(nats)


def _work(depths: list[Depth]) -> float:
    """Forward passes of the core, a backward pass being three."""
    return float(sum(depth.no_grad + WITH_GRAD_COST * depth.with_grad for depth in depths))


def _advance(
    state: TrainState, config: TrainConfig, *, is_spike: bool, is_applied: bool, step_s: float
) -> None:
    state.step += 1
    state.rows += config.rows_per_step
    state.tokens += config.batch.global_tokens
    state.trained_s += step_s
    state.skipped_updates += not is_applied
    state.skipped_in_a_row = 0 if is_applied else state.skipped_in_a_row + 1
    state.bad_in_a_row = state.bad_in_a_row + 1 if is_spike or not is_applied else 0


def _depth_metrics(depths: list[Depth]) -> dict[str, float]:
    totals = [depth.total for depth in depths]
    return {
        "depth/mean": sum(totals) / len(totals),
        "depth/min": min(totals),
        "depth/max": max(totals),
    }


def _speed_metrics(
    config: TrainConfig, world: World, depths: list[Depth], step_s: float
) -> dict[str, float]:
    tokens_per_s = config.batch.global_tokens / step_s
    flops_per_token = TokenFlops.of(config.model).model(
        no_grad=sum(depth.no_grad for depth in depths) / len(depths),
        with_grad=sum(depth.with_grad for depth in depths) / len(depths),
    )
    metrics = {
        "speed/step_s": step_s,
        "speed/tokens_per_s": tokens_per_s,
        "speed/model_flops_per_s_per_rank": tokens_per_s * flops_per_token / world.size,
    }
    if world.device.type == "cuda":
        metrics["memory/peak_bytes"] = torch.cuda.max_memory_allocated(world.device)
    return metrics
