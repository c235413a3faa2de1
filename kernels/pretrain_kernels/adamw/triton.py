"""AdamW in one pass of 28 bytes per parameter, with each tensor's sum of squared gradients.

Rounding the weights into a bf16 copy on the way adds 2 bytes, where a pass of its own takes 6.
"""

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
def _step_of(p, g, m, v, keep, rest1, beta2, rest2, root, epsilon, eta):
    m = m + rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    p = p * keep - eta * (m / (tl.sqrt(v) / root + epsilon))
    return p, m, v


@triton.jit
def _adamw(
    weight, rounded, gradient, mean, square, table, partials,
    factor, keep, rest1, beta2, rest2, root, epsilon, eta,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    factor = tl.cast(factor, tl.float32)
    keep = tl.cast(keep, tl.float32)
    rest1 = tl.cast(rest1, tl.float32)
    beta2 = tl.cast(beta2, tl.float32)
    rest2 = tl.cast(rest2, tl.float32)
    root = tl.cast(root, tl.float32)
    epsilon = tl.cast(epsilon, tl.float32)
    eta = tl.cast(eta, tl.float32)
    start, low, high, _ = read_span(table, SPAN)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    if (low == 0) & (high == SPAN):
        for block in range(BLOCKS):
            at = start + block * BLOCK + lane
            p, g = tl.load(weight + at), tl.load(gradient + at) * factor
            m, v = tl.load(mean + at), tl.load(square + at)
            p, m, v = _step_of(p, g, m, v, keep, rest1, beta2, rest2, root, epsilon, eta)
            total += g.to(tl.float64) * g.to(tl.float64)
            tl.store(weight + at, p)
            if rounded is not None:
                tl.store(rounded + at, p.to(rounded.dtype.element_ty))
            tl.store(mean + at, m)
            tl.store(square + at, v)
    else:
        for block in range(BLOCKS):
            inside = block * BLOCK + lane
            is_own = (inside >= low) & (inside < high)
            at = start + inside
            p = tl.load(weight + at, mask=is_own, other=0.0)
            g = tl.load(gradient + at, mask=is_own, other=0.0) * factor
            m = tl.load(mean + at, mask=is_own, other=0.0)
            v = tl.load(square + at, mask=is_own, other=1.0)
            p, m, v = _step_of(p, g, m, v, keep, rest1, beta2, rest2, root, epsilon, eta)
            total += g.to(tl.float64) * g.to(tl.float64)
            tl.store(weight + at, p, mask=is_own)
            if rounded is not None:
                tl.store(rounded + at, p.to(rounded.dtype.element_ty), mask=is_own)
            tl.store(mean + at, m, mask=is_own)
            tl.store(square + at, v, mask=is_own)
    tl.store(partials + tl.program_id(0), tl.sum(total, 0))


def adamw_(
    weight: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    spans: Spans,
    *,
    rate: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    step: int,
    factor: float = 1.0,
    rounded: Tensor | None = None,
) -> Tensor:
    """See `reference.adamw_`."""
    partials_S = empty_partials(spans)
    if len(partials_S):
        with torch.cuda.device_of(weight):
            _adamw[(len(partials_S),)](
                weight, rounded, gradient, mean, square, spans.table_S4, partials_S, float(factor),
                float(1 - rate * weight_decay), float(1 - beta1), float(beta2), float(1 - beta2),
                float((1 - beta2**step) ** 0.5), float(epsilon), float(rate / (1 - beta1**step)),
                SPAN=SPAN_ELEMENTS, BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=NUM_WARPS,
            )  # fmt: skip
    return add_up(partials_S, spans)
