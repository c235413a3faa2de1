"""Sums of squares over the tensors of a flat partition: one pass of 4 bytes per element."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain_kernels.spans import SPAN_ELEMENTS, Spans
from pretrain_kernels.spans_triton import (
    BLOCK,
    BLOCKS,
    NUM_WARPS,
    add_up,
    empty_partials,
    read_span,
)


@triton.jit
def _squares(
    gradient, table, partials, SPAN: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    start, low, high, _ = read_span(table, SPAN)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    if (low == 0) & (high == SPAN):
        for block in range(BLOCKS):
            g = tl.load(gradient + start + block * BLOCK + lane).to(tl.float64)
            total += g * g
    else:
        for block in range(BLOCKS):
            inside = block * BLOCK + lane
            is_own = (inside >= low) & (inside < high)
            g = tl.load(gradient + start + inside, mask=is_own, other=0.0).to(tl.float64)
            total += g * g
    tl.store(partials + tl.program_id(0), tl.sum(total, 0))


def square_sums(gradient: Tensor, spans: Spans) -> Tensor:
    """See `reference.square_sums`."""
    partials_S = empty_partials(spans)
    if len(partials_S):
        with torch.cuda.device_of(gradient):
            _squares[(len(partials_S),)](
                gradient, spans.table_S4, partials_S,
                SPAN=SPAN_ELEMENTS, BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=NUM_WARPS,
            )  # fmt: skip
    return add_up(partials_S, spans)
