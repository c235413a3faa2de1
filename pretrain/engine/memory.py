"""Memory of one rank under each ZeRO stage, before anything is allocated. Torch-free.

Weights, gradients, masters and moments are exact. Buckets are the buffers that DeepSpeed 0.19 and
pretrain/engine/reduction.py allocate, activations what pretrain/model/activations.py counts; both
are estimates. Contexts and workspaces of libraries, and fragmentation, are not in the sum; nor,
under ZeRO-2 with engine.overlap_comm, gradients that a rank keeps while it is ahead of the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.engine.config import EngineConfig, Precision
from pretrain.model.activations import peak_activation_bytes
from pretrain.model.config import ComputePath, ModelConfig
from pretrain.model.cost import count_parameters

GIB = 2**30
_FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes on one rank."""

    weights: int
    """Weights in the precision that they multiply in."""
    gradients: int
    """Gradients summed over micro-steps, float32."""
    masters: int
    """Float32 weights that the optimizer steps."""
    moments: int
    """Mean of gradients and of their squares, float32."""
    buffers: int
    """Gradients on their way, and weights gathered for the moment (stage 3)."""
    activations: int
    """What the backward pass of one micro-step needs at its fullest moment, with what float8
    copies of weights stay beside it."""

    @property
    def total(self) -> int:
        """All of it."""
        states = self.weights + self.gradients + self.masters + self.moments
        return states + self.buffers + self.activations


def element_bytes(precision: Precision) -> int:
    """Bytes of a weight or activation."""
    return 2 if precision is Precision.bf16 else 4


def rank_memory(
    model: ModelConfig,
    engine: EngineConfig,
    *,
    backprop: int,
    ranks: int,
    micro_rows: int,
    micro_steps: int,
) -> Memory:
    """Bytes on the fullest of `ranks` ranks with `micro_rows` rows at the greatest depth.

    Over more than one micro-step, float8 copies of weights may stay (EngineConfig.keeps_float8).
    """
    counts = count_parameters(model)
    parameters = sum(counts.values())
    share = -(-parameters // ranks)
    element = element_bytes(engine.precision)
    return Memory(
        weights=element * (share if engine.zero_stage == 3 else parameters),
        gradients=_FP32_BYTES * (parameters if engine.zero_stage == 1 else share),
        masters=_FP32_BYTES * share,
        moments=2 * _FP32_BYTES * share,
        buffers=_buffer_bytes(engine, model.path, counts),
        activations=peak_activation_bytes(
            model,
            backprop,
            rows=micro_rows,
            element_bytes=element,
            kept_iterations=engine.model_kept_iterations,
            keeps_float8=engine.keeps_float8(micro_steps=micro_steps),
        ),
    )


def _buffer_bytes(engine: EngineConfig, path: ComputePath, counts: Mapping[str, int]) -> int:
    parameters, element = sum(counts.values()), element_bytes(engine.precision)
    bucket = min(engine.bucket_elements, parameters)
    # the tied embedding's gradient waits from the head to the end of the backward pass
    waiting = element * counts["embedding"]
    if engine.reduces_itself:
        # stage 1 is summed where it lies
        return waiting + (_FP32_BYTES * bucket if engine.zero_stage == 2 else 0)
    # stages 2 and 3 first collect gradients in the precision of the weights
    width = _FP32_BYTES + (element if engine.zero_stage > 1 else 0)
    buckets = bucket * width * (2 if engine.overlap_comm else 1)
    if engine.zero_stage == 3:
        # the whole core is gathered at once, and its gradients leave together or layer by layer
        core = element * (counts["core"] + counts["adapter"])
        waiting += core if path is ComputePath.fused else 2 * core
    return waiting + buckets


def checkpoint_bytes(model: ModelConfig) -> int:
    """Bytes of one checkpoint: float32 weights and two moments."""
    return 3 * _FP32_BYTES * sum(count_parameters(model).values())
