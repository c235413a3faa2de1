"""ELLISAdam on flat partitions: moments with each tensor's sum, then weights.

Between the two passes the caller adds the sums of all ranks and finds each tensor's rate.
"""

import torch
from torch import Tensor

from pretrain_kernels.dispatch import choose
from pretrain_kernels.ellis_adam import reference
from pretrain_kernels.operands import check_like, check_rows
from pretrain_kernels.spans import Spans, check_partition


def update_moments(
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    spans: Spans,
    *,
    beta1: float,
    beta2: float,
    floor: float,
    is_start: bool,
    factor: float = 1.0,
) -> Tensor:
    """Update both moments in place and return each tensor's sum of g^2 / square, float64.

    g = factor x gradient, rounded to the gradient's dtype; the gradient itself is left as it is
    mean <- mean + (1 - beta1) (g - mean)
    square <- max(beta2 square + (1 - beta2) g^2, floor^2)

    `factor` clips by a norm, or undoes a loss scale, without a pass of its own.
    With `is_start` both begin as g and g^2, whatever they hold. Elements outside of
    all spans are not touched. Raises ValueError unless all are 1-D, contiguous and alike.
    """
    check_partition("ellis_adam", spans, gradient=gradient, mean=mean, square=square)
    run = reference.update_moments
    if gradient.dtype == torch.float32 and choose("ellis_adam", gradient):
        from pretrain_kernels.ellis_adam.triton import update_moments as run
    return run(
        gradient, mean, square, spans,
        beta1=beta1, beta2=beta2, floor=floor, is_start=is_start, factor=factor,
    )  # fmt: skip


def update_weights(
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    etas: Tensor,
    spans: Spans,
    *,
    keep: float,
    correction: float,
    rounded: Tensor | None = None,
) -> None:
    """weight <- keep x weight - eta x atan2(mean, correction x sqrt(square)), in place.

    `etas` has a float32 rate for each tensor. `rounded`, of any floating dtype, gets the new
    weights rounded to nearest: the copy that a model computes with. Elements outside of all spans
    are not touched. Raises ValueError unless all are 1-D, contiguous and alike.
    """
    check_partition("ellis_adam", spans, weight=weight, mean=mean, square=square)
    if etas.shape != (spans.num_tensors,) or etas.dtype != torch.float32:
        raise ValueError(
            f"ellis_adam: etas are {etas.dtype} of shape {tuple(etas.shape)}; "
            f"they must be torch.float32, one for each of {spans.num_tensors} tensors."
        )
    if rounded is not None:
        check_like("ellis_adam: rounded", rounded, weight.shape, rounded.dtype, weight)
        check_rows("ellis_adam: rounded", rounded, 1)
    run = reference.update_weights
    if weight.dtype == torch.float32 and choose("ellis_adam", weight):
        from pretrain_kernels.ellis_adam.triton import update_weights as run
    run(
        weight, mean, square, etas, spans, keep=keep, correction=correction, rounded=rounded
    )  # fmt: skip
