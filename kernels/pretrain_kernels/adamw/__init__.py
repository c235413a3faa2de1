"""AdamW on flat partitions, with each tensor's sum of squared gradients in the same pass."""

import torch
from torch import Tensor

from pretrain_kernels.adamw import reference
from pretrain_kernels.dispatch import choose
from pretrain_kernels.spans import Spans, check_partition


def adamw_(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    spans: Spans,
    *,
    rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    step: int,
) -> Tensor:
    """Update weight and moments in place and return each tensor's sum of gradient^2, float64.

    The rule of torch.optim.AdamW at its `step`-th update, counted from 1. Elements outside of all
    spans are not touched. Raises ValueError unless all are 1-D, contiguous and alike, or step < 1.
    """
    check_partition("adamw", spans, weight=weight, gradient=gradient, mean=mean, square=square)
    if step < 1:
        raise ValueError(f"adamw: step={step}, but steps are counted from 1.")
    run = reference.adamw_
    if weight.dtype == torch.float32 and choose("adamw", weight):
        from pretrain_kernels.adamw.triton import adamw_ as run
    return run(
        weight, gradient, mean, square, spans, rate=rate, beta1=beta1, beta2=beta2,
        epsilon=epsilon, weight_decay=weight_decay, step=step,
    )  # fmt: skip
