"""Quantization both ways: the largest magnitudes, the scales, then the values, tile by tile.

No value can be written before its whole row and its whole column have been read, so x is read
twice and each result is written once: 6 bytes an element of bf16. Making a transposed copy and
quantizing both takes 10.
"""

# N rows  D columns; in kernels, capitals are pointers and compile-time constants

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain_kernels.fp8 import SMALLEST_SCALE, Fp8, empty_fp8
from pretrain_kernels.quantize_rows.triton import scale_of_bits

# Of a tile. Compiled for sm_90, the two kernels together have the fewest instructions an element so
# (7.5 and 11.6), of tiles of 64 to 256 by 32 to 128. results/micro.csv, at 35840x5280: 70 % of a
# copy's bandwidth. Other numbers, not yet run: kernels/benchmarks/tune.py --only quantize_both_ways
ROWS, COLUMNS = 64, 128
NUM_WARPS = 4
SCALES_BLOCK = 1024


@triton.jit
def _load_tile(X, rows, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(tile, its rows, its columns); zero outside of x."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < D)[None, :]
    return tl.load(X + row[:, None] * D + column[None, :], mask=inside, other=0.0), row, column


@triton.jit
def _find_maxima(
    X,
    ROW_BITS,
    COLUMN_BITS,
    rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The largest magnitude of each row and column, as the bits of a float32, above zero."""
    x, row, column = _load_tile(X, rows, D, ROWS, COLUMNS)
    # Magnitudes compare like their bits, and NaN's bits lie above all others. A maximum does not
    # depend on the order in which tiles come.
    bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(ROW_BITS + row, tl.max(bits, 1), mask=row < rows, sem="relaxed")
    tl.atomic_max(COLUMN_BITS + column, tl.max(bits, 0), mask=column < D, sem="relaxed")


@triton.jit
def _find_scales(BITS, SCALE, RECIPROCAL, length, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    scale = scale_of_bits(tl.load(BITS + at, mask=at < length, other=0))
    tl.store(SCALE + at, scale, mask=at < length)
    tl.store(RECIPROCAL + at, tl.div_rn(1.0, scale), mask=at < length)


@triton.jit
def _quantize_tile(
    X,
    RECIPROCAL,
    RECIPROCAL_T,
    VALUES,
    VALUES_T,
    rows,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of VALUES [N, D] and of VALUES_T [D, N]."""
    x, row, column = _load_tile(X, rows, D, ROWS, COLUMNS)
    x = x.to(tl.float32)
    by_row = x * tl.load(RECIPROCAL + row, mask=row < rows, other=0.0)[:, None]
    by_column = x * tl.load(RECIPROCAL_T + column, mask=column < D, other=0.0)[None, :]
    inside = (row < rows)[:, None] & (column < D)[None, :]
    place = row[:, None] * D + column[None, :]
    tl.store(VALUES + place, by_row.to(VALUES.dtype.element_ty), mask=inside)
    inside = (column < D)[:, None] & (row < rows)[None, :]
    place = column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(VALUES_T + place, tl.trans(by_column.to(VALUES_T.dtype.element_ty)), mask=inside)


def quantize_both_ways(x_ND: Tensor, out: tuple[Fp8, Fp8] | None = None) -> tuple[Fp8, Fp8]:
    """As pretrain_kernels.quantize_both_ways says."""
    rows, width = x_ND.shape
    if out is None:
        out = empty_fp8(rows, width, x_ND.device), empty_fp8(width, rows, x_ND.device)
    if not x_ND.numel():
        # no element, so the least scale
        for narrow in out:
            narrow.scale_N1.fill_(SMALLEST_SCALE)
        return out
    # no magnitude lies below
    bits = torch.zeros(rows + width, dtype=torch.int32, device=x_ND.device).split((rows, width))
    reciprocals = [torch.empty_like(each, dtype=torch.float32) for each in bits]
    grid = triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS)
    sizes = {"D": width, "ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": NUM_WARPS}
    with torch.cuda.device_of(x_ND):
        _find_maxima[grid](x_ND, *bits, rows, **sizes)
        for each, narrow, reciprocal in zip(bits, out, reciprocals, strict=True):
            blocks = (triton.cdiv(len(each), SCALES_BLOCK),)
            _find_scales[blocks](each, narrow.scale_N1, reciprocal, len(each), BLOCK=SCALES_BLOCK)
        _quantize_tile[grid](
            x_ND, *reciprocals, out[0].values_ND, out[1].values_ND, rows, **sizes
        )  # fmt: skip
    return out
