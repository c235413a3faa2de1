"""Sums of squares over the tensors of a flat partition, in plain PyTorch."""

import torch
from torch import Tensor

from pretrain_kernels.spans import Spans

# The float64 temporary stays below 128 MiB.
CHUNK_ELEMENTS = 1 << 24


def square_sums(gradient: Tensor, spans: Spans) -> Tensor:
    """Float64 sum of gradient^2 of each tensor."""
    sums = torch.zeros(spans.num_tensors, dtype=torch.float64, device=gradient.device)
    for tensor, start, numel in spans.pieces:
        for chunk in gradient.narrow(0, start, numel).split(CHUNK_ELEMENTS):
            sums[tensor] += chunk.double().square().sum()
    return sums
