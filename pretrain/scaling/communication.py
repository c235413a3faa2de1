"""What ranks exchange in a step under each ZeRO stage, and how long they stand still for it.

Gradients travel in float32. Stage 1 all-reduces them once a step; stage 2 all-reduces every bucket
in every micro-step and keeps its own part; stage 3 reduce-scatters them in every micro-step, and
gathers the weights for each forward and each backward pass. Stages 1 and 2 gather the updated
weights once a step. With engine.overlap_comm gradients travel during the backward pass that makes
them, under stage 1 the last one of the step; both slow each other, because collectives run on the
GPU's multiprocessors too, so only a share is hidden (cluster.hardware.overlap_share).
"""

from dataclasses import dataclass

from pretrain.config import TrainConfig
from pretrain.engine.memory import element_bytes
from pretrain.model.cost import count_parameters
from pretrain.scaling.collectives import Collectives
from pretrain.scaling.compute import RowSeconds, mean_row_iterations

_FP32_BYTES = 4
# Queries, keys and values; their output; the two matrices of the MLP: one gather each.
_GATHERS_PER_LAYER = 4
# The tied embedding at either end, and the core, which is one module.
_GATHERS_ELSEWHERE = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Communication:
    """Seconds in which a rank computes nothing because bytes travel."""

    per_step_s: float
    """Once a step, less what is hidden under the last backward pass."""
    per_micro_step_s: float
    """In every micro-step, less what is hidden under its backward pass."""

    def of_step(self, micro_steps: int) -> float:
        """Of a whole step."""
        return self.per_step_s + micro_steps * self.per_micro_step_s


def communication(config: TrainConfig) -> Communication:
    """Of a run as configured. Small sums of scalars that every step makes are not counted."""
    collectives, engine, model = Collectives.of(config.cluster), config.engine, config.model
    parameters = sum(count_parameters(model).values())
    weights = element_bytes(engine.precision) * parameters
    gradients = _FP32_BYTES * parameters
    buckets = -(-parameters // engine.bucket_elements)
    if engine.zero_stage == 1:
        reduced = collectives.all_reduce(gradients, pieces=buckets)
        updated = collectives.gather(weights, pieces=buckets)
        hidden = _hidden_s(config, reduced)
        return Communication(per_step_s=reduced - hidden + updated, per_micro_step_s=0.0)
    if engine.zero_stage == 2:
        per_step = collectives.gather(weights, pieces=buckets)
        reduced, gathered = collectives.all_reduce(gradients, pieces=buckets), 0.0
    else:
        per_step = 0.0
        calls = _GATHERS_PER_LAYER * (model.prelude_layers + model.coda_layers) + _GATHERS_ELSEWHERE
        reduced = collectives.gather(gradients, pieces=buckets)
        gathered = 2 * collectives.gather(weights, pieces=calls)
    hidden = _hidden_s(config, reduced)
    return Communication(per_step_s=per_step, per_micro_step_s=reduced - hidden + gathered)


def _hidden_s(config: TrainConfig, reduced_s: float) -> float:
    if not config.engine.overlap_comm:
        return 0.0
    _, with_grad, recomputed = mean_row_iterations(config, config.depth)
    backward_s = RowSeconds.of(config).backward_s(with_grad, recomputed)
    beside_s = min(reduced_s, config.batch.micro_rows * backward_s)
    return config.cluster.hardware.overlap_share * beside_s
