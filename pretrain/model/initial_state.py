"""The random state s_0 from which each row's recurrence starts.

A pure function of (seed, global row, position, channel), so a run gives a row the same start on
any number of ranks, in any micro-batch, and after any number of resumes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.model.keyed import make_key, truncated_normals

# The embedding's sigma, sqrt(2 / (5 D)), times the embedding's scale, sqrt(D).
STATE_SIGMA = math.sqrt(2.0 / 5.0)


# B rows  T positions  D width
def initial_states(
    global_rows: Sequence[int],
    *,
    seed: int,
    context: int,
    width: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    first_position: int = 0,
) -> Tensor:
    """s_0 of the rows, [B, T, D]: normal with std sqrt(2/5), cut at +-3 sigma (true std 0.62397).

    `context` positions from `first_position` on. Raises ConfigError if a row has more than 2^31
    elements. Source: arXiv 2502.05171, section 3; the keying is ours.
    """
    stop = (first_position + context) * width
    if stop > 2**31 - 1:
        raise ConfigError(
            f"context {first_position + context} x width {width} = {stop} exceeds the 2^31 - 1 "
            "numbers of one row's initial state; shorten model.context."
        )
    counters_N = torch.arange(first_position * width, stop, dtype=torch.int32, device=device)
    state_BTD = torch.empty(len(global_rows), context, width, dtype=dtype, device=device)
    for state_TD, row in zip(state_BTD, global_rows, strict=True):
        draws_N = truncated_normals(make_key("initial state", seed, row), counters_N)
        # Through float32 first, so that a bfloat16 state is the float32 state rounded.
        state_TD.copy_(draws_N.mul_(STATE_SIGMA).float().view(context, width))
    return state_BTD
