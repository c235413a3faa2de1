"""Bias and rotary positions in plain PyTorch, forward and backward, in any dtype."""

# B rows  T tokens  N = B x T  H heads  K head width  P = K / 2 pairs

import torch
from torch import Tensor

from pretrain_kernels.operands import deliver, statistics_dtype


def qk_rope_(qkv_N3HK: Tensor, bias_2HK: Tensor | None, cos_NP: Tensor, sin_NP: Tensor) -> Tensor:
    """As pretrain_kernels.qk_rope says."""
    qk_N2HK = qkv_N3HK[:, :2]
    biased_N2HK = qk_N2HK if bias_2HK is None else qk_N2HK + bias_2HK
    qk_N2HK.copy_(_turned(biased_N2HK, cos_NP, sin_NP))
    return qkv_N3HK


def qk_rope_backward(
    dq_BTHK: Tensor,
    dk_BTHK: Tensor,
    dv_BTHK: Tensor,
    cos_NP: Tensor,
    sin_NP: Tensor,
    *,
    dbias_2HK: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As pretrain_kernels.qk_rope says."""
    dqkv_N3HK = torch.stack([dq_BTHK, dk_BTHK, dv_BTHK], 2).flatten(0, 1)
    # a rotation's transpose is the rotation by the opposite angle
    dqk_N2HK = _turned(dqkv_N3HK[:, :2], cos_NP, -sin_NP)
    if dbias_2HK is not None:
        dbias_2HK += dqk_N2HK.sum(0)
    dqkv_N3HK[:, :2] = dqk_N2HK.to(dqkv_N3HK.dtype)
    return deliver(dqkv_N3HK, out)


def _turned(x_N2HK: Tensor, cos_NP: Tensor, sin_NP: Tensor) -> Tensor:
    """Each pair (x_2j, x_2j+1) turned by angle j of its token, in float32 or float64."""
    wide_N2HK = x_N2HK.to(statistics_dtype(x_N2HK.dtype))
    even_N2HP, odd_N2HP = wide_N2HK.unflatten(-1, (-1, 2)).unbind(-1)
    cos_N11P, sin_N11P = cos_NP[:, None, None], sin_NP[:, None, None]
    turned = (
        even_N2HP * cos_N11P - odd_N2HP * sin_N11P,
        odd_N2HP * cos_N11P + even_N2HP * sin_N11P,
    )
    return torch.stack(turned, -1).flatten(-2)
