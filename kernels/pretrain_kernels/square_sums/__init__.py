"""The sum of squares of each tensor in a flat partition."""

import torch
from torch import Tensor

from pretrain_kernels.dispatch import choose
from pretrain_kernels.spans import Spans, check_partition
from pretrain_kernels.square_sums import reference


def square_sums(gradient: Tensor, spans: Spans) -> Tensor:
    """Each tensor's sum of gradient^2, float64: no finite float32 overflows, and NaN stays NaN.

    Elements outside of all spans are not read. Raises ValueError unless `gradient` is 1-D,
    contiguous and holds the spans.
    """
    check_partition("square_sums", spans, gradient=gradient)
    run = reference.square_sums
    if gradient.dtype == torch.float32 and choose("square_sums", gradient):
        from pretrain_kernels.square_sums.triton import square_sums as run
    return run(gradient, spans)
