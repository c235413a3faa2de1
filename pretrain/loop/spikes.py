"""The ladder against loss spikes: judged from the losses of the run alone, so every rank agrees.

What it remembers is part of `TrainState`, hence of every checkpoint: a resumed run judges as the
uninterrupted one does.
"""

import math
import statistics
from typing import NamedTuple

from pretrain.loop.guard_config import SpikeConfig
from pretrain.loop.state import TrainState

# Of a normal distribution: standard deviation over median absolute deviation.
_DEVIATIONS_PER_MAD = 1.4826
# A window of losses that are all alike must not make the last digit a spike.
_LEAST_DEVIATION_NATS = 1e-3


class Verdict(NamedTuple):
    """What the loss of a step says."""

    score: float
    """Robust deviations above the good steps before it; 0 while there are too few of them."""
    is_spike: bool
    drops_update: bool


def judge(state: TrainState, loss_nats: float, config: SpikeConfig) -> Verdict:
    """Whether the loss of the step after `state` is a spike. A non-finite loss always is one."""
    if not math.isfinite(loss_nats):
        return Verdict(math.inf, is_spike=True, drops_update=True)
    if len(state.good_losses) < config.window_steps:
        return Verdict(0.0, is_spike=False, drops_update=False)
    median = statistics.median(state.good_losses)
    mad = statistics.median(abs(loss - median) for loss in state.good_losses)
    deviation = max(_DEVIATIONS_PER_MAD * mad, _LEAST_DEVIATION_NATS)
    score = (loss_nats - median) / deviation
    return Verdict(score, score >= config.alert_score, score >= config.skip_score)


def note(state: TrainState, loss_nats: float, verdict: Verdict, config: SpikeConfig) -> None:
    """Count a step that has been judged."""
    state.spikes += verdict.is_spike
    if not verdict.is_spike:
        state.good_losses.append(loss_nats)
        del state.good_losses[: -config.window_steps]


def first_bad_step(state: TrainState) -> int:
    """The first of the last steps that were spikes or had no update; the next step if none was."""
    return state.step - state.bad_in_a_row + 1


def must_rewind(state: TrainState, config: SpikeConfig) -> bool:
    """Whether spikes and dropped updates have gone on for so long that the run must go back."""
    return (
        config.rewind_after > 0
        and state.bad_in_a_row > 0
        and state.bad_in_a_row % config.rewind_after == 0
    )
