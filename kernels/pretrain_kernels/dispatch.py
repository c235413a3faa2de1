"""Which implementation of an op runs: the fused Triton kernel or the plain PyTorch reference."""

import functools
import importlib.util
import logging
import os
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
# Names ops, with commas between them, that run as their references: what is a kernel worth?
OFF = "PRETRAIN_KERNELS_OFF"


def is_fused(*tensors: Tensor) -> bool:
    """Whether ops on these tensors run as Triton kernels.

    They do on CUDA where triton is installed, and on any device in Triton's interpreter
    (TRITON_INTERPRET=1). float64 always takes the reference, which is what others are checked by.
    """
    if not has_triton() or any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    return is_interpreted() or all(tensor.is_cuda for tensor in tensors)


def choose(op: str, tensor: Tensor) -> bool:
    """`is_fused` and not switched off, said once for each op, device and choice in the log.

    A warning where the tensor is on CUDA and a missing triton, or PRETRAIN_KERNELS_OFF, alone keeps
    the kernel from running. Raises ValueError if that names something that is no op.
    """
    is_off = op in switched_off(os.environ.get(OFF, ""))
    fused = is_fused(tensor) and not is_off
    lacks_triton = tensor.is_cuda and not has_triton()
    _announce(op, str(tensor.device), fused, lacks_triton, is_off)
    return fused


@functools.cache
def ops() -> frozenset[str]:
    """Every op that may run as a kernel, each a folder with its reference."""
    return frozenset(path.parent.name for path in Path(__file__).parent.glob("*/reference.py"))


@functools.cache
def switched_off(names: str) -> frozenset[str]:
    """The ops that PRETRAIN_KERNELS_OFF=`names` names. Raises ValueError for what is no op."""
    off = frozenset(filter(None, names.split(",")))
    if unknown := sorted(off - ops()):
        raise ValueError(
            f"{OFF}={names} names {', '.join(unknown)}; the ops are {', '.join(sorted(ops()))}."
        )
    return off


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed; nothing is imported."""
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _announce(op: str, device: str, fused: bool, lacks_triton: bool, is_off: bool) -> None:
    if is_off:
        logger.warning("%s on %s runs as PyTorch, because %s names it", op, device, OFF)
    elif lacks_triton:
        logger.warning(
            "%s on %s runs as plain PyTorch, which is slower: triton is not installed"
            " (pip install 'pretrain[kernels]')",
            op,
            device,
        )
    else:
        logger.info("%s on %s runs as %s", op, device, "a Triton kernel" if fused else "PyTorch")
