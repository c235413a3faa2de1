"""Rows quantized to float8_e4m3fn, each by its own scale."""

# N rows  D width

from types import ModuleType

from torch import Tensor

from pretrain_kernels.dispatch import choose
from pretrain_kernels.fp8 import Fp8, check_fp8
from pretrain_kernels.operands import check_rows
from pretrain_kernels.quantize_rows import reference

__all__ = ["Fp8", "quantize_rows"]


def quantize_rows(x_ND: Tensor, out: Fp8 | None = None) -> Fp8:
    """x_ND as float8_e4m3fn values and one float32 scale for each row.

    scale = max(largest magnitude of the row * (1 / 448), 2^-126) and values = x * (1 / scale) in
    float32, rounded to nearest. A row with a NaN becomes NaN altogether, its scale too. With an
    infinity the scale is infinite, the infinity becomes NaN and finite values zero.

    Raises ValueError for x_ND that is not contiguous, 2-D and floating point.
    """
    check_rows("x_ND", x_ND)
    check_fp8("out", out, x_ND.shape, x_ND)
    return _implementation(x_ND).quantize_rows(x_ND, out)


def _implementation(tensor: Tensor) -> ModuleType:
    if choose("quantize_rows", tensor):
        from pretrain_kernels.quantize_rows import triton

        return triton
    return reference
