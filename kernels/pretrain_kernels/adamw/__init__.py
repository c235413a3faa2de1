"""AdamW on flat partitions, with each tensor's sum of squared gradients in the same pass."""

import torch
from torch import Tensor

from pretrain_kernels.adamw import reference
from pretrain_kernels.dispatch import choose
from pretrain_kernels.operands import check_like, check_rows
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
    factor: float = 1.0,
    rounded: Tensor | None = None,
) -> Tensor:
    """Update weight and moments in place and return each tensor's sum of gradient^2, float64.

    The rule of torch.optim.AdamW at its `step`-th update, counted from 1, with gradients of
    factor x gradient, which are those summed; the gradient itself is left as it is. `rounded`, of
    any floating dtype, gets the new weights rounded to nearest. Elements outside of all spans are
    not touched. Raises ValueError unless all are 1-D, contiguous and alike, or step < 1.
    """
    check_partition("adamw", spans, weight=weight, gradient=gradient, mean=mean, square=square)
    if step < 1:
        raise ValueError(f"adamw: step={step}, but steps are counted from 1.")
    if rounded is not None:
        check_like("adamw: rounded", rounded, weight.shape, rounded.dtype, weight)
        check_rows("adamw: rounded", rounded, 1)
    run = reference.adamw_
    if weight.dtype == torch.float32 and choose("adamw", weight):
        from pretrain_kernels.adamw.triton import adamw_ as run
    return run(
        weight, gradient, mean, square, spans, rate=rate, beta1=beta1, beta2=beta2,
        epsilon=epsilon, weight_decay=weight_decay, step=step, factor=factor, rounded=rounded,
    )  # fmt: skip
