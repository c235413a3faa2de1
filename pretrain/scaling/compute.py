"""Seconds that one GPU computes: rows by their depth, the optimizer's step, a validation.

A row costs a + b n + c k + b m with n iterations without and k with gradient, m of which are
computed again. They follow from exact FLOPs and two measured rates, so one fit serves every
depth, context and recomputation.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.config import TrainConfig
from pretrain.engine.config import Precision
from pretrain.model.config import DepthConfig
from pretrain.model.cost import (
    TokenFlops,
    count_parameters,
    layer_weights,
    mean_iterations,
    mean_recomputed,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateBytes:
    """Traffic for each parameter of what a step does besides its passes."""

    update: float
    """Once a step; ranks share it."""
    first: float
    """To begin the float32 sum of gradients with a step's first micro-step, on every rank."""
    later: float
    """To add those of another micro-step."""
    own: float = 0
    """To add to what a rank keeps of the sum, in each micro-step; ranks share it."""


# EllisAdam's kernels move 36 (20, then 16); with what DeepSpeed's step does to gradients and
# weights around it: 57.5 ms for 3.565 B parameters at 4.27 TB/s, in the run whose kernels are in
# kernels/benchmarks/results/2026-11-26-h200/engine-profile.csv. A micro-step's gradient is widened
# to float32, then added: read and written, read twice and written.
DEEPSPEED = UpdateBytes(update=69, first=2 + 4 + 12, later=2 + 4 + 12)
_DEEPSPEED_FP32 = UpdateBytes(update=69, first=12, later=12)
# engine/takeover: norms 4, moments 20, weights and their bf16 copies 18. Sums begin and go on under
# ZeRO-1; ZeRO-2 sets its share to zero, widens each gradient into a bucket, and adds from there.
_ZERO_1 = UpdateBytes(update=4 + 20 + 18, first=2 + 4, later=2 + 8)
_ZERO_2 = UpdateBytes(update=4 + 20 + 18 + 4, first=2 + 4, later=2 + 4, own=12)


def update_bytes(config: TrainConfig) -> UpdateBytes:
    """Of the step that a run takes: DeepSpeed's under ZeRO-3 and in fp32, else ours."""
    if config.engine.precision is Precision.fp32:
        return _DEEPSPEED_FP32
    return {1: _ZERO_1, 2: _ZERO_2, 3: DEEPSPEED}[config.engine.zero_stage]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSeconds:
    """Seconds of one row, forward and backward, on one GPU."""

    once_s: float
    """Prelude, coda and head."""
    no_grad_s: float
    """An iteration without gradient."""
    with_grad_s: float
    """An iteration with gradient, forward and backward."""
    recomputed_s: float
    """More for an iteration that the backward pass computes again."""
    kept_iterations: int | None
    """The last so many of a row are not computed again; None: none is."""

    @staticmethod
    def of(config: TrainConfig) -> "RowSeconds":
        """At the rates of config.cluster."""
        cluster, context = config.cluster, config.model.context
        flops = TokenFlops.of(config.model)
        forward = cluster.gpu_flops * cluster.hardware.forward_utilization
        training = cluster.gpu_flops * cluster.utilization
        no_grad_s = context * flops.iteration / forward
        return RowSeconds(
            once_s=context * 3 * flops.once / training,
            no_grad_s=no_grad_s,
            with_grad_s=context * 3 * flops.iteration / training,
            recomputed_s=no_grad_s,
            kept_iterations=config.engine.model_kept_iterations,
        )

    def at(self, no_grad: float, with_grad: float, recomputed: float) -> float:
        """Of a row with so many iterations, or the mean of rows with so many on average."""
        once = self.once_s + self.no_grad_s * no_grad + self.with_grad_s * with_grad
        return once + self.recomputed_s * recomputed

    def backward_s(self, with_grad: float, recomputed: float) -> float:
        """Of a row's backward pass alone: two of three forward passes' worth, what is redone."""
        twice = (self.once_s + self.with_grad_s * with_grad) * 2 / 3
        return twice + self.recomputed_s * recomputed

    def of_depths(self, totals: NDArray[np.int64], backprop: int) -> NDArray[np.float64]:
        """Of rows with these total iterations, same shape."""
        with_grad = np.minimum(totals, backprop)
        seconds: NDArray[np.float64] = (
            self.once_s
            + self.no_grad_s * (totals - with_grad)
            + self.with_grad_s * with_grad
            + self.recomputed_s * recomputed_iterations(with_grad, self.kept_iterations)
        )
        return seconds


def recomputed_iterations(
    with_grad: NDArray[np.int64], kept_iterations: int | None
) -> NDArray[np.int64]:
    """Of rows with so many iterations with gradient, those that are computed again, same shape."""
    if kept_iterations is None:
        return np.zeros_like(with_grad)
    return np.maximum(with_grad - kept_iterations, 0)


def mean_row_iterations(config: TrainConfig, depth: DepthConfig) -> tuple[float, float, float]:
    """Mean iterations of a run's rows under a law: without gradient, with it, computed again."""
    rows = config.total_tokens // config.model.context
    kept = config.engine.model_kept_iterations
    recomputed = mean_recomputed(depth, rows=rows, kept_iterations=kept)
    return *mean_iterations(depth, rows=rows), recomputed


def optimizer_s(config: TrainConfig, moved: UpdateBytes | None = None) -> float:
    """Seconds of an update, and of adding every micro-step's gradient to the sum of its step.

    Each rank streams its share of masters, moments and gradients; sums are of all parameters.
    `moved` is what a recorded run moved where that is not what runs today.
    """
    moved = moved or update_bytes(config)
    parameters = sum(count_parameters(config.model).values())
    cluster, batch = config.cluster, config.batch
    micro_steps = config.rows_per_step // cluster.ranks // batch.micro_rows
    shared = (moved.update + moved.own * micro_steps) / cluster.ranks
    each = shared + moved.first + moved.later * (micro_steps - 1)
    return each * parameters / cluster.hardware.memory_bytes_per_s


def validation_s(config: TrainConfig) -> float:
    """Seconds of one validation: a forward pass to the greatest depth, a coda at each depth."""
    cluster, model, depths = config.cluster, config.model, set(config.validation.depths)
    flops = TokenFlops.of(model)
    attention = 2 * model.width * (model.context + 1)
    prelude = model.prelude_layers * (2 * layer_weights(model) + attention)
    ends = len(depths) * (flops.once - prelude)
    token = prelude + ends + max(depths) * flops.iteration
    rate = cluster.gpu_flops * cluster.hardware.forward_utilization
    rows = -(-config.validation.rows // cluster.ranks)
    return rows * model.context * token / rate
