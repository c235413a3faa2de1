"""The random state s_0 from which each row's recurrence starts.

A pure function of (seed, global row, position, channel), so a run gives a row the same start on
any number of ranks, in any micro-batch, and after any number of resumes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.errors import ConfigError
from pretrain.model.keyed import Keys, make_key, stack_keys, truncated_normals

# The published model's: the embedding's sigma, sqrt(2 / (5 D)), times its scale, sqrt(D).
STATE_SIGMA = math.sqrt(2.0 / 5.0)


# B rows  T positions  D width
def initial_states(
    global_rows: Sequence[int],
    *,
    seed: int,
    context: int,
    width: int,
    sigma: float = STATE_SIGMA,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    first_position: int = 0,
) -> Tensor:
    """s_0 of the rows, [B, T, D]: normal with std `sigma` (the model's `state_sigma`), cut at 3.

    The cut makes the true std 0.98658 sigma. `context` positions from `first_position` on. Raises
    ConfigError if a row has more than 2^31 elements. Source: arXiv 2502.05171, section 3; the
    keying is ours.
    """
    stop = (first_position + context) * width
    _check_size(first_position + context, width)
    counters_N = torch.arange(first_position * width, stop, dtype=torch.int32, device=device)
    state_BTD = torch.empty(len(global_rows), context, width, dtype=dtype, device=device)
    for state_TD, row in zip(state_BTD, global_rows, strict=True):
        draws_N = truncated_normals(_key(seed, row), counters_N)
        # Through float32 first, so that a bfloat16 state is the float32 state rounded.
        state_TD.copy_(draws_N.mul_(sigma).float().view(context, width))
    return state_BTD


def state_keys(
    rows: Sequence[int], *, seed: int, context: int, width: int, device: torch.device
) -> Keys:
    """What `states_at` needs to know of the rows, whose positions stay below `context`."""
    _check_size(context, width)
    return stack_keys([_key(seed, row) for row in rows], device)


def states_at(positions_BT: Tensor, keys_B: Keys, *, width: int, sigma: float) -> Tensor:
    """What `initial_states` gives tokens at positions of their own: [B, T, D].

    All on the device, without a loop over rows.
    """
    channels_D = torch.arange(width, dtype=torch.int32, device=positions_BT.device)
    counters_BTD = positions_BT.int()[..., None] * width + channels_D
    first_B, second_B = keys_B
    key = first_B[:, None, None], second_B[:, None, None]
    return truncated_normals(key, counters_BTD).mul_(sigma).float()


def _check_size(positions: int, width: int) -> None:
    if positions * width > 2**31 - 1:
        raise ConfigError(
            f"context {positions} x width {width} = {positions * width} exceeds the 2^31 - 1 "
            "numbers of one row's initial state; shorten model.context."
        )


def _key(seed: int, row: int) -> tuple[int, int]:
    return make_key("initial state", seed, row)
