"""Which implementation of an op runs: the fused Triton kernel or the plain PyTorch reference."""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def is_fused(*tensors: Tensor) -> bool:
    """Whether ops on these tensors run as Triton kernels.

    They do on CUDA where triton is installed, and on any device in Triton's interpreter
    (TRITON_INTERPRET=1). float64 always takes the reference, which is what others are checked by.
    """
    if not has_triton() or any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    return is_interpreted() or all(tensor.is_cuda for tensor in tensors)


def choose(op: str, tensor: Tensor) -> bool:
    """`is_fused`, said once for each op, device and choice in the log.

    A warning where the tensor is on CUDA and only a missing triton keeps the kernel from running.
    """
    fused = is_fused(tensor)
    lacks_triton = tensor.is_cuda and not has_triton()
    _announce(op, str(tensor.device), fused, lacks_triton)
    return fused


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed; nothing is imported."""
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _announce(op: str, device: str, fused: bool, lacks_triton: bool) -> None:
    if lacks_triton:
        logger.warning(
            "%s on %s runs as plain PyTorch, which is slower: triton is not installed"
            " (pip install 'pretrain[kernels]')",
            op,
            device,
        )
    else:
        logger.info("%s on %s runs as %s", op, device, "a Triton kernel" if fused else "PyTorch")
