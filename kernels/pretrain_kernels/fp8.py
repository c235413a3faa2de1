"""Rows in 8-bit floating point, each with its scale, as torch._scaled_mm takes them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain_kernels.operands import check_like

LARGEST = 448.0
"""Of float8_e4m3fn: a row's largest magnitude becomes this."""
SMALLEST_SCALE = 2.0**-126
"""float32's smallest normal number: keeps the reciprocal finite for rows of zeros."""


class Fp8(NamedTuple):
    """values_ND (float8_e4m3fn) times scale_N1 (float32) is what was quantized."""

    values_ND: Tensor
    scale_N1: Tensor


def check_fp8(name: str, pair: Fp8 | None, shape: Sequence[int], model: Tensor) -> None:
    """Raise ValueError unless `pair` can take rows of this shape [N, D]; None passes."""
    if pair is None:
        return
    check_like(f"{name}.values_ND", pair.values_ND, shape, torch.float8_e4m3fn, model)
    check_like(f"{name}.scale_N1", pair.scale_N1, (shape[0], 1), torch.float32, model)


def empty_fp8(rows: int, width: int, device: torch.device) -> Fp8:
    """Memory for that many rows of that width."""
    return Fp8(
        torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=device),
        torch.empty(rows, 1, dtype=torch.float32, device=device),
    )
