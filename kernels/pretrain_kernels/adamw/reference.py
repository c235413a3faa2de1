"""AdamW on a flat partition in plain PyTorch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pretrain_kernels.spans import Spans

# Temporaries stay below 128 MiB each, whatever the size of a tensor.
CHUNK_ELEMENTS = 1 << 24


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
    """Update weight and moments in place; float64 sum of (factor gradient)^2 of each tensor."""
    sums = torch.zeros(spans.num_tensors, dtype=torch.float64, device=weight.device)
    root, eta = (1 - beta2**step) ** 0.5, rate / (1 - beta1**step)
    for tensor, start, end in _chunks(spans):
        p, g, m, v = (t[start:end] for t in (weight, gradient, mean, square))
        if factor != 1.0:
            g = g * factor
        p.mul_(1 - rate * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(m, v.sqrt().div_(root).add_(epsilon), value=-eta)
        sums[tensor] += g.double().square().sum()
        if rounded is not None:
            rounded[start:end].copy_(p)
    return sums


def _chunks(spans: Spans) -> Iterator[tuple[int, int, int]]:
    """(tensor index, first element, one past the last) of small parts of the partition."""
    for tensor, begin, numel in spans.pieces:
        for start in range(begin, begin + numel, CHUNK_ELEMENTS):
            yield tensor, start, min(start + CHUNK_ELEMENTS, begin + numel)
