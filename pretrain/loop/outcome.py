"""Whether a run that has taken its last step has ended well.

In mid-run a step whose numbers are not finite may pass: the next ones tell, and after
guards.stop_after_skips of them the run stops. After the last step there is no next one.
"""

import math

from pretrain.errors import DivergenceError
from pretrain.loop.state import TrainState


def check_weights(state: TrainState, held_out_nats: float) -> None:
    """Raise DivergenceError if the run's last weights have no finite loss on held-out rows.

    For the time before they are saved: an earlier checkpoint may be of use, they are not.
    """
    if not math.isfinite(held_out_nats):
        raise DivergenceError(
            f"The run has taken its last step, {state.step}, but its weights are of no use and are "
            f"not saved: their held-out loss is {held_out_nats}. Lower optimizer.learning_rate and "
            "train on from a checkpoint whose weights are good, or from the start."
        )


def check_last_steps(state: TrainState) -> None:
    """Raise DivergenceError if the numbers of a run's last step were not finite."""
    if state.not_finite_in_a_row:
        raise DivergenceError(
            f"The run has taken its last step, {state.step}, but {describe_last_steps(state)}. "
            "`pretrain replay` shows the rows. If those weights will do, they are saved; to train "
            "them on, give more run.steps, and a lower optimizer.learning_rate."
        )


def describe_last_steps(state: TrainState) -> str:
    """What was wrong with the last steps, whose numbers were not finite."""
    count = state.not_finite_in_a_row
    which = f"step {state.step}" if count == 1 else f"the last {count} steps"
    return (
        f"{which} had no update, because loss or gradient were not finite: the weights are those "
        f"of step {state.step - state.skipped_in_a_row}"
    )
