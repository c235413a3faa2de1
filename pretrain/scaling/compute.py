"""Seconds that one GPU computes: rows by their depth, the optimizer's step, a validation.

A row costs a + b n + c k with n iterations without and k with gradient. The three follow from
exact FLOPs and two measured rates, so one fit serves every depth, context and recomputation.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pretrain.config import TrainConfig
from pretrain.model.cost import TokenFlops, count_parameters, layer_weights

# Counted in optim/ellis_adam: about 30 reads or writes of float32 for each parameter, unfused.
_OPTIMIZER_BYTES = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSeconds:
    """Seconds of one row, forward and backward, on one GPU."""

    once_s: float
    """Prelude, coda and head."""
    no_grad_s: float
    """An iteration without gradient."""
    with_grad_s: float
    """An iteration with gradient, with its recomputation if any."""

    @staticmethod
    def of(config: TrainConfig) -> "RowSeconds":
        """At the rates of config.cluster."""
        cluster, context = config.cluster, config.model.context
        flops = TokenFlops.of(config.model)
        forward = cluster.gpu_flops * cluster.hardware.forward_utilization
        training = cluster.gpu_flops * cluster.utilization
        no_grad_s = context * flops.iteration / forward
        recomputed_s = no_grad_s if config.engine.checkpoint_activations else 0.0
        return RowSeconds(
            once_s=context * 3 * flops.once / training,
            no_grad_s=no_grad_s,
            with_grad_s=context * 3 * flops.iteration / training + recomputed_s,
        )

    def at(self, no_grad: float, with_grad: float) -> float:
        """Of a row with so many iterations, or the mean of rows with so many on average."""
        return self.once_s + self.no_grad_s * no_grad + self.with_grad_s * with_grad

    def backward_s(self, with_grad: float) -> float:
        """Of a row's backward pass alone: two of three forward passes' worth."""
        return (self.once_s + self.with_grad_s * with_grad) * 2 / 3

    def of_depths(self, totals: NDArray[np.int64], backprop: int) -> NDArray[np.float64]:
        """Of rows with these total iterations, same shape."""
        with_grad = np.minimum(totals, backprop)
        seconds: NDArray[np.float64] = (
            self.once_s + self.no_grad_s * (totals - with_grad) + self.with_grad_s * with_grad
        )
        return seconds


def optimizer_s(config: TrainConfig) -> float:
    """Seconds of an update: each rank streams its share of masters, moments and gradients."""
    share = sum(count_parameters(config.model).values()) / config.cluster.ranks
    return _OPTIMIZER_BYTES * share / config.cluster.hardware.memory_bytes_per_s


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
