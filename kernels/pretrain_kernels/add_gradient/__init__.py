"""A gradient into its sum over micro-steps, which a first one starts instead of being added."""

import torch
from torch import Tensor

from pretrain_kernels.add_gradient import reference
from pretrain_kernels.dispatch import choose
from pretrain_kernels.operands import check_rows


def add_gradient(total: Tensor, gradient: Tensor, *, is_first: bool) -> None:
    """total <- gradient with `is_first`, else total + gradient; both 1-D, added in total's dtype.

    What `total` held before a first gradient does not matter, so nobody needs to fill it with
    zeros. Raises ValueError unless both are contiguous and of one length, on one device.
    """
    check_rows("add_gradient: total", total, 1)
    check_rows("add_gradient: gradient", gradient, 1)
    if gradient.shape != total.shape or gradient.device != total.device:
        raise ValueError(
            f"add_gradient: gradient has shape {tuple(gradient.shape)} on {gradient.device}; it "
            f"must be as total, {tuple(total.shape)} on {total.device}."
        )
    run = reference.add_gradient
    if total.dtype == torch.float32 and choose("add_gradient", total):
        from pretrain_kernels.add_gradient.triton import add_gradient as run
    run(total, gradient, is_first=is_first)
