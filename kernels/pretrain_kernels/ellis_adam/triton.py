"""ELLISAdam's two passes: 20 and 16 bytes per parameter, no temporaries.

Rounding the weights into a bf16 copy on the way adds 2 bytes, where a pass of its own takes 6.

A program handles one span. A span that lies wholly inside a tensor is read without masks, in
16-byte accesses; one at a tensor's edge with masks.
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

HALF_PI = tl.constexpr(1.5707963267948966)
QUARTER_PI = tl.constexpr(0.7853981633974483)
TANGENT_PI_8 = tl.constexpr(0.41421356237309503)
# atan(x) = x + x^3 (A + B x^2 + C x^4 + D x^6 + E x^8) for |x| <= tan(pi / 8): our own fit for the
# least relative error (least squares, reweighted until errors are equal); 7e-10 before rounding
A, B = tl.constexpr(-0.3333331550525), tl.constexpr(0.1999848943723)
C, D, E = tl.constexpr(-0.14243848759), tl.constexpr(0.10596001734), tl.constexpr(-0.06083453829)


@triton.jit
def angle_of(mean, root):
    """atan2(mean, root) for root >= 0, within 3 units in the last place; atan2(0, 0) = 0."""
    size = tl.abs(mean)
    large = tl.maximum(size, root)
    ratio = tl.minimum(size, root) / tl.where(large == 0.0, 1.0, large)
    is_wide = ratio > TANGENT_PI_8
    x = tl.where(is_wide, (ratio - 1.0) / (ratio + 1.0), ratio)
    z = x * x
    angle = x + x * z * (A + z * (B + z * (C + z * (D + z * E))))
    angle = tl.where(is_wide, QUARTER_PI + angle, angle)
    angle = tl.where(size > root, HALF_PI - angle, angle)
    # minima and maxima pass over NaN
    angle = tl.where(mean == mean, angle, mean)
    angle = tl.where(root == root, angle, root)
    return tl.where(mean < 0.0, -angle, angle)


@triton.jit
def _moments_of(g, m, v, beta2, rest1, rest2, least):
    m = m + rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    # unlike a maximum, this keeps NaN
    v = tl.where(v < least, least, v)
    return m, v, (g * g / v).to(tl.float64)


@triton.jit
def _moments(
    gradient, mean, square, table, partials, factor, beta2, rest1, rest2, least,
    IS_START: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    factor = tl.cast(factor, tl.float32)
    beta2 = tl.cast(beta2, tl.float32)
    rest1 = tl.cast(rest1, tl.float32)
    rest2 = tl.cast(rest2, tl.float32)
    least = tl.cast(least, tl.float32)
    start, low, high, _ = read_span(table, SPAN)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    if (low == 0) & (high == SPAN):
        for block in range(BLOCKS):
            at = start + block * BLOCK + lane
            g = tl.load(gradient + at) * factor
            m, v = g, g * g
            if not IS_START:
                m, v = tl.load(mean + at), tl.load(square + at)
            m, v, ratio = _moments_of(g, m, v, beta2, rest1, rest2, least)
            total += ratio
            tl.store(mean + at, m)
            tl.store(square + at, v)
    else:
        for block in range(BLOCKS):
            inside = block * BLOCK + lane
            is_own = (inside >= low) & (inside < high)
            at = start + inside
            g = tl.load(gradient + at, mask=is_own, other=0.0) * factor
            m, v = g, g * g
            if not IS_START:
                m = tl.load(mean + at, mask=is_own, other=0.0)
                v = tl.load(square + at, mask=is_own, other=1.0)
            m, v, ratio = _moments_of(g, m, v, beta2, rest1, rest2, least)
            total += tl.where(is_own, ratio, 0.0)
            tl.store(mean + at, m, mask=is_own)
            tl.store(square + at, v, mask=is_own)
    tl.store(partials + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _weights(
    weight, rounded, mean, square, etas, table, keep, correction,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    keep = tl.cast(keep, tl.float32)
    correction = tl.cast(correction, tl.float32)
    start, low, high, tensor = read_span(table, SPAN)
    eta = tl.load(etas + tensor)
    lane = tl.arange(0, BLOCK)
    if (low == 0) & (high == SPAN):
        for block in range(BLOCKS):
            at = start + block * BLOCK + lane
            angle = angle_of(tl.load(mean + at), tl.sqrt(tl.load(square + at)) * correction)
            p = tl.load(weight + at) * keep - angle * eta
            tl.store(weight + at, p)
            if rounded is not None:
                tl.store(rounded + at, p.to(rounded.dtype.element_ty))
    else:
        for block in range(BLOCKS):
            inside = block * BLOCK + lane
            is_own = (inside >= low) & (inside < high)
            at = start + inside
            m = tl.load(mean + at, mask=is_own, other=0.0)
            v = tl.load(square + at, mask=is_own, other=1.0)
            angle = angle_of(m, tl.sqrt(v) * correction)
            p = tl.load(weight + at, mask=is_own, other=0.0) * keep - angle * eta
            tl.store(weight + at, p, mask=is_own)
            if rounded is not None:
                tl.store(rounded + at, p.to(rounded.dtype.element_ty), mask=is_own)


def update_moments(
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    spans: Spans,
    *,
    beta1: float,
    beta2: float,
    floor: float,
    is_start: bool,
    factor: float = 1.0,
) -> Tensor:
    """See `reference.update_moments`."""
    partials_S = empty_partials(spans)
    if len(partials_S):
        with torch.cuda.device_of(gradient):
            _moments[(len(partials_S),)](
                gradient, mean, square, spans.table_S4, partials_S,
                float(factor), float(beta2), float(1 - beta1), float(1 - beta2),
                float(floor * floor),
                IS_START=is_start, SPAN=SPAN_ELEMENTS, BLOCK=BLOCK, BLOCKS=BLOCKS,
                num_warps=NUM_WARPS,
            )  # fmt: skip
    return add_up(partials_S, spans)


def update_weights(
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    etas: Tensor,
    spans: Spans,
    *,
    keep: float,
    correction: float,
    rounded: Tensor | None = None,
) -> None:
    """See `reference.update_weights`."""
    if len(spans.table_S4):
        with torch.cuda.device_of(weight):
            _weights[(len(spans.table_S4),)](
                weight, rounded, mean, square, etas, spans.table_S4,
                float(keep), float(correction),
                SPAN=SPAN_ELEMENTS, BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=NUM_WARPS,
            )  # fmt: skip
