"""A matrix quantized to float8_e4m3fn twice: as it is by rows, and transposed by columns."""

# N rows  D columns

from types import ModuleType

from torch import Tensor

from pretrain_kernels.dispatch import choose
from pretrain_kernels.fp8 import Fp8, check_fp8
from pretrain_kernels.operands import check_rows
from pretrain_kernels.quantize_both_ways import reference

__all__ = ["quantize_both_ways"]


def quantize_both_ways(x_ND: Tensor, out: tuple[Fp8, Fp8] | None = None) -> tuple[Fp8, Fp8]:
    """quantize_rows of x_ND [N, D] and of its transpose [D, N], bit for bit.

    A product with a weight takes the first and the gradient of its input the second: float8 rows
    lie along what is summed over, and each has one scale.

    Raises ValueError for x_ND that is not contiguous, 2-D and floating point, and for `out` of
    another shape.
    """
    check_rows("x_ND", x_ND)
    by_row, by_column = (None, None) if out is None else out
    check_fp8("out[0]", by_row, x_ND.shape, x_ND)
    check_fp8("out[1]", by_column, x_ND.shape[::-1], x_ND)
    return _implementation(x_ND).quantize_both_ways(x_ND, out)


def _implementation(tensor: Tensor) -> ModuleType:
    if choose("quantize_both_ways", tensor):
        from pretrain_kernels.quantize_both_ways import triton

        return triton
    return reference
