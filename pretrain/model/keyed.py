"""Random numbers that are pure functions of a key and a counter.

No generator, no state: the same numbers on every device, rank, and batch layout, in any order of
drawing. The bits come from two keyed rounds of the 32-bit mixer lowbias32 (C. Wellons, "hash
prospector"); the key from BLAKE2b. The quantile is taken in float64, so devices whose erfinv
differs in the last place still round to the same float32.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Keys = tuple[Tensor, Tensor]
# Two words, or two int32 tensors of them that broadcast with the counters.
Key = tuple[int, int] | Keys

# Truncated normals end at this many standard deviations, everywhere in the model.
CUT_SIGMAS = 3.0


def make_key(*parts: object) -> tuple[int, int]:
    """Two signed 32-bit words from parts with a stable text, e.g. ("initial state", seed, row)."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return (
        int.from_bytes(digest[:4], "little", signed=True),
        int.from_bytes(digest[4:], "little", signed=True),
    )


def stack_keys(keys: Sequence[tuple[int, int]], device: torch.device) -> Keys:
    """Keys as tensors [B]; to draw with, shaped so that they broadcast with the counters."""
    first_B, second_B = torch.tensor(keys, dtype=torch.int32, device=device).unbind(1)
    return first_B, second_B


def uniforms(key: Key, counters_N: Tensor) -> Tensor:
    """Float64 numbers in (0, 1), one for each int32 counter."""
    return _symmetric(key, counters_N).add_(1.0).mul_(0.5)


def truncated_normals(key: Key, counters_N: Tensor) -> Tensor:
    """Float64 draws, one for each int32 counter: a standard normal cut at +-3 (its std is 0.98658).

    Not rescaled after the cut, like the reference's.
    """
    inside = math.erf(CUT_SIGMAS / math.sqrt(2.0))
    return torch.erfinv(_symmetric(key, counters_N).mul_(inside)).mul_(math.sqrt(2.0))


def _symmetric(key: Key, counters_N: Tensor) -> Tensor:
    """Float64 in (-1, 1): the middle of one of 2^32 equal cells."""
    assert counters_N.dtype == torch.int32, counters_N.dtype
    bits_N = _mix(_mix(counters_N ^ key[0]).bitwise_xor_(key[1]))
    return bits_N.to(torch.float64).add_(0.5).mul_(2.0**-31)


def _mix(x_N: Tensor) -> Tensor:
    """A bijection of 32-bit words; int32 products wrap, masks turn shifts into logical ones."""
    x_N = x_N ^ ((x_N >> 16) & 0xFFFF)
    x_N.mul_(0x7FEB352D)
    x_N.bitwise_xor_((x_N >> 15) & 0x1FFFF)
    x_N.mul_(0x846CA68B - (1 << 32))
    return x_N.bitwise_xor_((x_N >> 16) & 0xFFFF)
