"""Sums over the rows of a small matrix: the last step of gradients that many programs add up."""

# P programs, a row of partial sums each  D columns

import triton
import triton.language as tl
from torch import Tensor

# Columns of a program, a whole 128-byte line of float32, and rows of one access. Few columns,
# because only many programs read fast: 165 of them for a gain of 5,280.
COLUMNS, ROWS = 32, 64
NUM_WARPS = 4


@triton.jit
def _add_columns(PARTIAL, TOTAL, rows, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < D
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        place = row[:, None] * D + column[None, :]
        sums += tl.load(PARTIAL + place, mask=(row < rows)[:, None] & here[None, :], other=0.0)
    total = tl.load(TOTAL + column, mask=here, other=0.0)
    tl.store(TOTAL + column, total + tl.sum(sums, 0), mask=here)


def add_columns(partial_PD: Tensor, total_D: Tensor) -> None:
    """Add the sums of partial_PD's columns to total_D (float32), always in the same order.

    Called where their device is the current one.
    """
    rows, width = partial_PD.shape
    _add_columns[(triton.cdiv(width, COLUMNS),)](
        partial_PD, total_D, rows, D=width, COLUMNS=COLUMNS, ROWS=ROWS, num_warps=NUM_WARPS
    )  # fmt: skip
