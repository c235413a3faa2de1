"""Numbers that tell a recurrence that works from the two ways in which it has failed.

The published model's first runs failed with states that all tokens shared, and with a state that
the core ignored (arXiv 2502.05171, section 4.3 and appendix). Everything here is a mean over the
tokens of a row that count, in float64, so that sums over rows and ranks are exact enough in any
order.
"""

# B rows  T tokens  D width

from typing import NamedTuple

import torch
from torch import Tensor


class Diagnostics(NamedTuple):
    """One number per row, float64 [B] each; 0 in rows that are not measured.

    States are compared as they are, before any norm: the reference subtracts a raw state from a
    normalised one.
    """

    state_correlation_B: Tensor
    """Token correlation of s_r: 0 if tokens point anywhere, near 1 if all have one state."""
    hidden_correlation_B: Tensor
    """Token correlation of what the head sees."""
    state_norm_B: Tensor
    """||s_r||."""
    residual_B: Tensor
    """||s_r - s_(r-1)|| / ||s_r||: how far the last iteration still moved."""
    is_measured_B: Tensor
    """1, or 0 in rows with fewer than two tokens that count."""


def diagnose(
    previous_BTD: Tensor, state_BTD: Tensor, hidden_BTD: Tensor, counted_BT: Tensor
) -> Diagnostics:
    """Diagnostics of s_(r-1), s_r and the last hidden vectors; only `counted` tokens take part."""
    is_measured_B = counted_BT.sum(1) >= 2
    wide_BTD = state_BTD.to(torch.promote_types(state_BTD.dtype, torch.float32))
    norm_BT = wide_BTD.norm(dim=-1)
    residual_BT = relative_move(previous_BTD, state_BTD)
    return Diagnostics(
        token_correlation(state_BTD, counted_BT).where(is_measured_B, 0.0),
        token_correlation(hidden_BTD, counted_BT).where(is_measured_B, 0.0),
        _mean(norm_BT, counted_BT).where(is_measured_B, 0.0),
        _mean(residual_BT, counted_BT).where(is_measured_B, 0.0),
        is_measured_B.double(),
    )


def relative_move(previous_BTD: Tensor, state_BTD: Tensor) -> Tensor:
    """||s - previous|| / ||s|| of each token, float32 or wider: [B, T]."""
    wide_BTD = state_BTD.to(torch.promote_types(state_BTD.dtype, torch.float32))
    return (wide_BTD - previous_BTD).norm(dim=-1) / wide_BTD.norm(dim=-1)


def row_means(values_NBT: Tensor, counted_BT: Tensor) -> Tensor:
    """Means over the counted tokens of each row, float64 [N, B]; 0 as in `Diagnostics`."""
    is_measured_B = counted_BT.sum(1) >= 2
    means = [_mean(values_BT, counted_BT).where(is_measured_B, 0.0) for values_BT in values_NBT]
    return torch.stack(means)


def token_correlation(x_BTD: Tensor, counted_BT: Tensor) -> Tensor:
    """Mean cosine between the tokens of a row, less the share 1/n of tokens with themselves: [B].

    Each vector is first freed of its mean over channels. Between -1/n and 1 - 1/n for n tokens.
    The sum over all pairs of unit vectors is the square of their sum, so no [T, T] is built.
    """
    wide_BTD = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
    unit_BTD = torch.nn.functional.normalize(wide_BTD - wide_BTD.mean(-1, keepdim=True), dim=-1)
    counted_BT = counted_BT.to(unit_BTD.dtype)
    sum_BD = torch.einsum("btd,bt->bd", unit_BTD, counted_BT).double()
    tokens_B = counted_BT.sum(1).double()
    return (sum_BD.square().sum(-1) / tokens_B - 1) / tokens_B


def _mean(values_BT: Tensor, counted_BT: Tensor) -> Tensor:
    kept_BT = values_BT.where(counted_BT, 0.0)
    return kept_BT.sum(1, dtype=torch.float64) / counted_BT.sum(1)
