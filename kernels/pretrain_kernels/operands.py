"""What the kernels demand of the tensors they are given, and where results go."""

from collections.abc import Sequence

import torch
from torch import Tensor

STORAGE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_rows(name: str, tensor: Tensor, dimensions: int = 2) -> None:
    """Raise ValueError unless `tensor` is contiguous floating-point data of so many dimensions."""
    check_storage(name, tensor, dimensions)
    _check_contiguous(name, tensor)


def check_like(
    name: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype, model: Tensor
) -> None:
    """Raise ValueError unless `tensor` has this shape and dtype, is contiguous, and is by `model`.

    None passes: the argument was not given.
    """
    if tensor is not None:
        check_kind(name, tensor, shape, dtype, model)
        _check_contiguous(name, tensor)


def check_storage(name: str, tensor: Tensor, dimensions: int) -> None:
    """Raise ValueError unless `tensor` is floating-point data of so many dimensions."""
    if tensor.dim() != dimensions:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: it needs {dimensions} dimensions"
        )
    if tensor.dtype not in STORAGE:
        allowed = ", ".join(str(dtype) for dtype in STORAGE)
        raise ValueError(f"{name} is {tensor.dtype}: it must be one of {allowed}")


def check_kind(
    name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, model: Tensor
) -> None:
    """Raise ValueError unless `tensor` has this shape and dtype and is where `model` is."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be {tuple(shape)}")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}: it must be {dtype}")
    if tensor.device != model.device:
        raise ValueError(f"{name} is on {tensor.device}: it must be on {model.device}")


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of sums and roots over values of `dtype`: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def deliver(value: Tensor, out: Tensor | None) -> Tensor:
    """`value`, written into `out` if there is one."""
    return value if out is None else out.copy_(value)


def _check_contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} has strides {tensor.stride()}:"
            " it must be contiguous; call .contiguous() where that copy is meant"
        )
