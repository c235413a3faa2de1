"""ELLISAdam's two passes over a flat partition in plain PyTorch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pretrain_kernels.spans import Spans

# Temporaries stay below 64 MiB each, whatever the size of a tensor.
CHUNK_ELEMENTS = 1 << 24


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
    """Update both moments in place; float64 sum of (factor gradient)^2 / square of each tensor."""
    sums = torch.zeros(spans.num_tensors, dtype=torch.float64, device=gradient.device)
    for tensor, g, m, v in _chunks(spans, gradient, mean, square):
        if factor != 1.0:
            g = g * factor
        if is_start:
            m.copy_(g)
            torch.mul(g, g, out=v)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        v.clamp_(min=floor * floor)
        sums[tensor] += (g * g).div_(v).sum(dtype=torch.float64)
    return sums


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
    """weight <- keep x weight - eta of its tensor x atan2(mean, correction x sqrt(square)).

    `rounded` then gets the weights in its own dtype.
    """
    for tensor, p, m, v in _chunks(spans, weight, mean, square):
        angle = torch.atan2(m, v.sqrt().mul_(correction))
        p.mul_(keep).sub_(angle.mul_(etas[tensor]))
    if rounded is not None:
        for _, begin, numel in spans.pieces:
            rounded.narrow(0, begin, numel).copy_(weight.narrow(0, begin, numel))


def _chunks(
    spans: Spans, first: Tensor, mean: Tensor, square: Tensor
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Small views: (tensor index, part of the first, of the mean, of the mean square)."""
    for tensor, begin, numel in spans.pieces:
        for start in range(begin, begin + numel, CHUNK_ELEMENTS):
            size = min(CHUNK_ELEMENTS, begin + numel - start)
            yield (
                tensor,
                first.narrow(0, start, size),
                mean.narrow(0, start, size),
                square.narrow(0, start, size),
            )
