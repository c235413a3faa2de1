"""A bf16 gradient into its float32 sum: 6 bytes per element for a first one, 10 for the others.

PyTorch widens bf16 element by element, at less than half of the bandwidth (direct_copy in
benchmarks/results/2026-11-26-h200/engine-profile.csv: 11.6 ms for 3.5 B elements).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program: 16 a thread, two 16-byte loads of bf16.
BLOCK, NUM_WARPS = 2048, 4


@triton.jit
def _add(total, gradient, numel, IS_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        value = tl.load(gradient + at).to(tl.float32)
        if not IS_FIRST:
            value += tl.load(total + at)
        tl.store(total + at, value)
    else:
        value = tl.load(gradient + at, mask=at < numel, other=0.0).to(tl.float32)
        if not IS_FIRST:
            value += tl.load(total + at, mask=at < numel, other=0.0)
        tl.store(total + at, value, mask=at < numel)


def add_gradient(total: Tensor, gradient: Tensor, *, is_first: bool) -> None:
    """See `reference.add_gradient`."""
    numel = total.numel()
    if numel:
        with torch.cuda.device_of(total):
            _add[(triton.cdiv(numel, BLOCK),)](
                total, gradient, numel, IS_FIRST=is_first, BLOCK=BLOCK, num_warps=NUM_WARPS
            )
