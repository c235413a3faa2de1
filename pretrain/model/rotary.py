"""Rotary positions: adjacent pairs of a head's channels are rotated by position-dependent angles.

Positions are data, one per token, never an implied range, so documents may restart them.
"""

# B rows  T tokens  H heads  K head width  P = K / 2 pairs

import torch
from torch import Tensor


def angles(positions_BT: Tensor, *, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each token's P angles, float32 [B, T, P].

    theta_j = base^(-2j / K). Computed, not stored in a buffer: an engine that casts the model to
    bf16 would round a buffer, and rounded angles are wrong beyond a few hundred positions.
    """
    even_P = torch.arange(0, head_width, 2, dtype=torch.float32, device=positions_BT.device)
    theta_P = 1.0 / base ** (even_P / head_width)
    angles_BTP = positions_BT.to(torch.float32)[..., None] * theta_P
    return angles_BTP.cos(), angles_BTP.sin()


def rotate(x_BTHK: Tensor, cos_BTP: Tensor, sin_BTP: Tensor) -> Tensor:
    """(x_2j, x_2j+1) turned by angle j of its token, in float32, cast back to x's dtype."""
    wide_BTHK = x_BTHK.to(torch.promote_types(x_BTHK.dtype, torch.float32))
    even_BTHP, odd_BTHP = wide_BTHK.view(*x_BTHK.shape[:-1], -1, 2).unbind(-1)
    cos_BT1P, sin_BT1P = cos_BTP[:, :, None], sin_BTP[:, :, None]
    turned = (
        even_BTHP * cos_BT1P - odd_BTHP * sin_BT1P,
        odd_BTHP * cos_BT1P + even_BTHP * sin_BT1P,
    )
    return torch.stack(turned, -1).flatten(-2).to(x_BTHK.dtype)
