"""A gradient into its sum, in plain PyTorch."""

from torch import Tensor


def add_gradient(total: Tensor, gradient: Tensor, *, is_first: bool) -> None:
    """total <- gradient with `is_first`, else total + gradient, in total's dtype."""
    if is_first:
        total.copy_(gradient)
    else:
        total.add_(gradient)
