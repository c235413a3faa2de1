"""Row-wise quantization as one Triton kernel, and the part of it that other kernels fuse."""

# N rows  D width

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain_kernels.fp8 import LARGEST, SMALLEST_SCALE, Fp8, empty_fp8
from pretrain_kernels.launch import next_power_of_2, num_warps

# Elements a thread: results/micro.csv, quantize_rows at 4096x5280 (79 % of a copy's bandwidth).
# Other numbers: kernels/benchmarks/tune.py --only quantize_rows
ELEMENTS = 32
_RECIPROCAL = tl.constexpr(1.0 / LARGEST)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def scale_of_row(x):
    """The scale of one row: max(|x| (1 / 448), 2^-126) in float32, NaN if any of it is NaN.

    x comes in its storage dtype, and stays so until quantized(): that halves the registers.
    """
    # Magnitudes compare like their bits, and NaN's bits lie above all others: an integer maximum
    # keeps a NaN that a floating-point one would drop.
    if x.dtype.primitive_bitwidth == 16:
        bits = tl.max(x.to(tl.int16, bitcast=True) & 0x7FFF, 0).to(tl.int16)
    else:
        bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    return _scale_of(bits.to(x.dtype, bitcast=True).to(tl.float32))


@triton.jit
def scale_of_bits(bits):
    """The same of largest magnitudes that are given as the bits of float32 numbers."""
    return _scale_of(bits.to(tl.float32, bitcast=True))


@triton.jit
def _scale_of(largest):
    scale = largest * _RECIPROCAL
    return tl.where(scale < _SMALLEST_SCALE, _SMALLEST_SCALE, scale)


@triton.jit
def quantized(x, scale):
    """x / scale in float32, ready to be cast to float8."""
    return x.to(tl.float32) * tl.div_rn(1.0, scale)


@triton.jit
def _quantize_row(X, VALUES, SCALE, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    x = tl.load(X + row * D + column, mask=inside, other=0.0)
    scale = scale_of_row(x)
    values = quantized(x, scale).to(VALUES.dtype.element_ty)
    tl.store(VALUES + row * D + column, values, mask=inside)
    tl.store(SCALE + row, scale)


def quantize_rows(x_ND: Tensor, out: Fp8 | None = None) -> Fp8:
    """As pretrain_kernels.quantize_rows says."""
    rows, width = x_ND.shape
    if out is None:
        out = empty_fp8(rows, width, x_ND.device)
    block = next_power_of_2(width)
    if rows:
        with torch.cuda.device_of(x_ND):
            _quantize_row[(rows,)](
                x_ND, *out, D=width, BLOCK=block,
                num_warps=num_warps(block, elements_per_thread=ELEMENTS), enable_fp_fusion=False,
            )  # fmt: skip
    return out
