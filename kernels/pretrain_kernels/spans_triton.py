"""What the kernels over flat partitions share: which elements a program has, and the last sum."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain_kernels.spans import SPAN_ELEMENTS, Spans

# Elements of one access: 8 a thread, two 16-byte loads of each array.
# 95 % of the copy bandwidth on an H200, results/micro.csv; other sizes were not tried.
BLOCK, NUM_WARPS = 1024, 4
BLOCKS = SPAN_ELEMENTS // BLOCK
SUM_BLOCK = 1024


@triton.jit
def read_span(table, SPAN: tl.constexpr):
    """(first element of this program's span, first and last + 1 element in it, tensor)."""
    row = table + tl.program_id(0).to(tl.int64) * 4
    start = tl.load(row).to(tl.int64) * SPAN
    return start, tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit
def _add_up(partials, bounds, sums, BLOCK: tl.constexpr):
    tensor = tl.program_id(0)
    first = tl.load(bounds + tensor)
    end = tl.load(bounds + tensor + 1)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    while first < end:
        total += tl.load(partials + first + lane, mask=first + lane < end, other=0.0)
        first += BLOCK
    tl.store(sums + tensor, tl.sum(total, 0))


def add_up(partials_S: Tensor, spans: Spans) -> Tensor:
    """Sum of each tensor's partial sums, float64, always in the same order."""
    sums = torch.empty(spans.num_tensors, dtype=torch.float64, device=partials_S.device)
    with torch.cuda.device_of(sums):
        _add_up[(spans.num_tensors,)](partials_S, spans.bounds_T1, sums, BLOCK=SUM_BLOCK)
    return sums


def empty_partials(spans: Spans) -> Tensor:
    """Room for one float64 per span."""
    table_S4 = spans.table_S4
    return torch.empty(len(table_S4), dtype=torch.float64, device=table_S4.device)
