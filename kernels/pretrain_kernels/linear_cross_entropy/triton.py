"""The two passes over a chunk's logits: read once for the nats, read and written once for backward.

Logits of a row are read in blocks; the running maximum is one number per row, the running sum of
exponentials one per lane, so that a block costs one exponential per logit and one barrier.
"""

# N tokens  V vocabulary

import torch
import triton
import triton.language as tl
from torch import Tensor

IGNORED = tl.constexpr(-100)
# Finite, so that a lane that is masked throughout gives exp(-inf - LOWEST) = 0 and no NaN.
LOWEST = tl.constexpr(-3.0e38)
# 82 % of the copy bandwidth on an H200, results/micro.csv; other sizes were not tried.
BLOCK, NUM_WARPS = 4096, 4


@triton.jit
def _nats(logits, labels, nats, lses, z_loss, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    highest = tl.cast(LOWEST, tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        column = start + lane
        x = tl.load(logits + row * V + column, mask=column < V, other=float("-inf"))
        x = x.to(tl.float32)
        new_highest = tl.maximum(highest, tl.max(x, 0))
        # the maximum passes over NaN; the sum does not
        sums = sums * tl.exp(highest - new_highest) + tl.exp(x - new_highest)
        highest = new_highest
    lse = highest + tl.log(tl.sum(sums, 0))
    label = tl.load(labels + row)
    is_inside = (label >= 0) & (label < V)
    own = tl.load(logits + row * V + label, mask=is_inside, other=0.0).to(tl.float32)
    value = tl.where(is_inside, lse - own + tl.cast(z_loss, tl.float32) * lse * lse, float("nan"))
    tl.store(nats + row, tl.where(label == IGNORED, 0.0, value))
    tl.store(lses + row, lse)


@triton.jit
def _gradient(logits, labels, lses, upstream, z_loss, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels + row)
    lse = tl.load(lses + row)
    is_inside = (label >= 0) & (label < V)
    factor = tl.where(is_inside, tl.load(upstream + row), float("nan"))
    x = tl.load(logits + row * V + column, mask=column < V, other=0.0).to(tl.float32)
    slope = tl.exp(x - lse) * (1.0 + 2.0 * tl.cast(z_loss, tl.float32) * lse)
    slope = factor * tl.where(column == label, slope - 1.0, slope)
    slope = tl.where(label == IGNORED, 0.0, slope)
    tl.store(logits + row * V + column, slope.to(logits.dtype.element_ty), mask=column < V)


def block_of(vocabulary: int) -> int:
    """Logits that one program handles at a time."""
    return min(BLOCK, int(triton.next_power_of_2(vocabulary)))


def nats_and_lse(logits_NV: Tensor, labels_N: Tensor, *, z_loss: float) -> tuple[Tensor, Tensor]:
    """See `reference.nats_and_lse`; float32."""
    num_tokens, vocabulary = logits_NV.shape
    nats_N, lse_N = (
        torch.empty(num_tokens, dtype=torch.float32, device=logits_NV.device) for _ in range(2)
    )
    with torch.cuda.device_of(logits_NV):
        _nats[(num_tokens,)](
            logits_NV, labels_N, nats_N, lse_N, float(z_loss),
            V=vocabulary, BLOCK=block_of(vocabulary), num_warps=NUM_WARPS,
        )  # fmt: skip
    return nats_N, lse_N


def logits_to_gradient_(
    logits_NV: Tensor, labels_N: Tensor, lse_N: Tensor, upstream_N: Tensor, *, z_loss: float
) -> None:
    """See `reference.logits_to_gradient_`."""
    num_tokens, vocabulary = logits_NV.shape
    block = block_of(vocabulary)
    with torch.cuda.device_of(logits_NV):
        _gradient[(num_tokens, triton.cdiv(vocabulary, block))](
            logits_NV, labels_N, lse_N, upstream_N, float(z_loss),
            V=vocabulary, BLOCK=block, num_warps=NUM_WARPS,
        )  # fmt: skip
