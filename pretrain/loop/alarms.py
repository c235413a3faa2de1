"""The two ways in which a recurrence has failed, recognised at a validation and said by name.

The published model's first two runs showed them (arXiv 2502.05171, section 4.3); the training loss
alone shows neither. `collapse`: all tokens of a row share one state. `ignored_state`: the core
answers from the embedded tokens alone, so that more iterations do not help.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

from pretrain.config import TrainConfig

log = logging.getLogger(__name__)

COLLAPSE = "collapse"
IGNORED_STATE = "ignored_state"
REMEDIES = {
    COLLAPSE: "Lower optimizer.learning_rate, or keep model.block=sandwich, model.norm_gain=true, "
    "model.injection=linear and model.embedding_scale=true.",
    IGNORED_STATE: "Lower optimizer.learning_rate, or keep model.block=sandwich.",
}


class Alarms:
    """Which signatures the last validation showed; speaks when one begins and when it ends."""

    def __init__(self, config: TrainConfig, earlier: Sequence[dict[str, Any]] = ()) -> None:
        """`earlier`: the run's records so far; what was on in the last is not said again."""
        self._limits = config.validation.alarms
        self._mean_depth = config.depth.mean
        self._uniform_nats = math.log(config.model.vocabulary_size)
        self._is_on = {COLLAPSE: False, IGNORED_STATE: False}
        for record in earlier:
            for name in self._is_on:
                self._is_on[name] = bool(record.get(f"alarm/{name}", self._is_on[name]))

    def judge(self, step: int, result: dict[str, Any]) -> dict[str, int]:
        """1 or 0 for each alarm/NAME; WARNING when one begins, INFO when it ends."""
        may_begin = step >= self._limits.after_steps
        found = {COLLAPSE: self._collapse(result), IGNORED_STATE: self._ignored(result)}
        for name, (has_signature, sign) in found.items():
            is_on = may_begin and has_signature
            if is_on and not self._is_on[name]:
                log.warning("alarm %s begins at step %d: %s. %s", name, step, sign, REMEDIES[name])
            elif self._is_on[name] and not is_on:
                log.info("alarm %s ends at step %d: %s", name, step, sign)
            self._is_on[name] = is_on
        return {f"alarm/{name}": int(is_on) for name, is_on in self._is_on.items()}

    def _collapse(self, result: dict[str, Any]) -> tuple[bool, str]:
        state, hidden = result["state/token_correlation"], result["hidden/token_correlation"]
        limit = self._limits.collapse_correlation
        return max(state, hidden) >= limit, (
            f"tokens correlate by {state:.3f} in the state and {hidden:.3f} before the head "
            f"(limit {limit:g})"
        )

    def _ignored(self, result: dict[str, Any]) -> tuple[bool, str]:
        limits = self._limits
        one, mean = result["validation/loss_at_1_nats"], result["validation/loss_at_mean_nats"]
        is_taught = mean < limits.ignored_loss_share * self._uniform_nats
        # at a mean depth of 1 there is nothing to gain
        is_flat = self._mean_depth > 1 and one - mean < limits.ignored_gain_nats
        return is_taught and is_flat, (
            f"depth {self._mean_depth} is {one - mean:.4f} nats better than depth 1 "
            f"(limit {limits.ignored_gain_nats:g}) at a loss of {mean:.4f}"
        )
