"""The norm chain in plain PyTorch, forward and backward, in any floating-point dtype."""

# N rows x tokens  D width

from typing import NamedTuple

import torch
from torch import Tensor

from pretrain_kernels.fp8 import Fp8
from pretrain_kernels.operands import deliver, statistics_dtype
from pretrain_kernels.quantize_rows.reference import quantize_rows


class Chained(NamedTuple):
    """What a chain returns; 1 / RMS of a norm that is not there is None."""

    sum_ND: Tensor
    rstd_a_N: Tensor | None
    out_ND: Tensor | Fp8
    rstd_b_N: Tensor | None


def norm_chain(
    branch_ND: Tensor | None,
    residual_ND: Tensor,
    *,
    rstd_N: Tensor | None = None,
    gain_D: Tensor | None = None,
    gain_a_D: Tensor | None = None,
    gain_b_D: Tensor | None = None,
    epsilon: float,
    sum_out: Tensor | None = None,
    out: Tensor | Fp8 | None = None,
    fp8: bool = False,
) -> Chained:
    """As pretrain_kernels.norm_chain says."""
    x_ND = _norm(residual_ND, rstd_N, gain_D)
    sum_ND = x_ND if branch_ND is None else branch_ND + x_ND
    sum_ND = deliver(sum_ND, sum_out)
    rstd_a_N = None if gain_a_D is None else _rstd(sum_ND, epsilon)
    x_ND = _norm(sum_ND, rstd_a_N, gain_a_D)
    rstd_b_N = None if gain_b_D is None else _rstd(x_ND, epsilon)
    out_ND = _norm(x_ND, rstd_b_N, gain_b_D)
    if fp8:
        assert out is None or isinstance(out, Fp8)
        return Chained(sum_ND, rstd_a_N, quantize_rows(out_ND, out), rstd_b_N)
    assert out is None or isinstance(out, Tensor)
    return Chained(sum_ND, rstd_a_N, deliver(out_ND, out), rstd_b_N)


def norm_chain_backward(
    dout_ND: Tensor,
    dx_ND: Tensor | None,
    sum_ND: Tensor,
    *,
    rstd_a_N: Tensor | None,
    gain_a_D: Tensor | None,
    rstd_b_N: Tensor | None,
    gain_b_D: Tensor | None,
    dgain_a_D: Tensor | None = None,
    dgain_b_D: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As pretrain_kernels.norm_chain_backward says."""
    wide_ND = dout_ND.to(statistics_dtype(sum_ND.dtype))
    if rstd_b_N is not None and gain_b_D is not None:
        x_ND = _norm(sum_ND, rstd_a_N, gain_a_D)
        wide_ND = _norm_backward(wide_ND, _normed(x_ND, rstd_b_N), rstd_b_N, gain_b_D, dgain_b_D)
    if dx_ND is not None:
        wide_ND = wide_ND + dx_ND
    if rstd_a_N is not None and gain_a_D is not None:
        normed_ND = _normed(sum_ND, rstd_a_N)
        wide_ND = _norm_backward(wide_ND, normed_ND, rstd_a_N, gain_a_D, dgain_a_D)
    return deliver(wide_ND.to(sum_ND.dtype), out)


def norm_chain_output(
    sum_ND: Tensor,
    rstd_a_N: Tensor | None,
    gain_a_D: Tensor | None,
    rstd_b_N: Tensor | None,
    gain_b_D: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """As pretrain_kernels.norm_chain_output says."""
    x_ND = _norm(sum_ND, rstd_a_N, gain_a_D)
    return deliver(_norm(x_ND, rstd_b_N, gain_b_D), out)


def _rstd(x_ND: Tensor, epsilon: float) -> Tensor:
    """1 / RMS of each row, in float32 (float64 for float64)."""
    wide_ND = x_ND.to(statistics_dtype(x_ND.dtype))
    return torch.rsqrt(wide_ND.square().mean(1) + epsilon)


def _norm(x_ND: Tensor, rstd_N: Tensor | None, gain_D: Tensor | None) -> Tensor:
    """R(R(x * rstd) * gain), or x where there is no norm."""
    if rstd_N is None or gain_D is None:
        return x_ND
    return _normed(x_ND, rstd_N) * gain_D


def _normed(x_ND: Tensor, rstd_N: Tensor) -> Tensor:
    """R(x * rstd): what the gain multiplies."""
    return (x_ND.to(rstd_N.dtype) * rstd_N[:, None]).to(x_ND.dtype)


def _norm_backward(
    dy_ND: Tensor, normed_ND: Tensor, rstd_N: Tensor, gain_D: Tensor, dgain_D: Tensor | None
) -> Tensor:
    """The gradient of x for y = normed * gain, normed = x * rstd(x).

    rstd depends on x: dx = rstd (g - normed <g, normed>), with g = dy gain and <> a row's mean.
    """
    wide_ND = normed_ND.to(dy_ND.dtype)
    if dgain_D is not None:
        dgain_D += (dy_ND * wide_ND).sum(0)
    g_ND = dy_ND * gain_D
    return rstd_N[:, None] * (g_ND - wide_ND * (g_ND * wide_ND).mean(1, keepdim=True))
