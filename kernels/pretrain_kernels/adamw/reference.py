"""AdamW on a flat partition in plain PyTorch."""

import torch
from torch import Tensor

from pretrain_kernels.spans import Spans


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
    """Update weight and moments in place; float64 sum of gradient^2 of each tensor."""
    sums = torch.zeros(spans.num_tensors, dtype=torch.float64, device=weight.device)
    for tensor, start, numel in spans.pieces:
        p, g, m, v = (t.narrow(0, start, numel) for t in (weight, gradient, mean, square))
        p.mul_(1 - rate * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(epsilon)
        p.addcdiv_(m, denominator, value=-rate / (1 - beta1**step))
        sums[tensor] += g.double().square().sum()
    return sums
