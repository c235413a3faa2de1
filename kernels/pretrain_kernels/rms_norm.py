"""RMS normalisation with a gain: a norm chain of one norm and no residual.

It has no kernel of its own, so there is no reference beside it: norm_chain's serve.
Source: arXiv 1910.07467.
"""

# N rows x tokens  D width

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain_kernels.norm_chain import norm_chain, norm_chain_backward
from pretrain_kernels.operands import statistics_dtype


def rms_norm(
    x_ND: Tensor, gain_D: Tensor, epsilon: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """R(R(x * rstd) * gain) in x's dtype, and rstd_N = 1 / RMS in float32.

    Raises ValueError for wrong shapes, dtypes or strides.
    """
    chained = norm_chain(None, x_ND, gain_a_D=gain_D, epsilon=epsilon, out=out)
    assert isinstance(chained.out_ND, Tensor)
    assert chained.rstd_a_N is not None
    return chained.out_ND, chained.rstd_a_N


def rms_norm_backward(
    dy_ND: Tensor,
    x_ND: Tensor,
    rstd_N: Tensor,
    gain_D: Tensor,
    dgain_D: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of x; that of the gain is added to the float32 buffer dgain_D.

    Raises ValueError for wrong shapes, dtypes or strides.
    """
    return norm_chain_backward(
        dy_ND,
        None,
        x_ND,
        rstd_a_N=rstd_N,
        gain_a_D=gain_D,
        rstd_b_N=None,
        gain_b_D=None,
        dgain_a_D=dgain_D,
        out=out,
    )


def rms_norm_autograd(x: Tensor, gain_D: Tensor, epsilon: float) -> Tensor:
    """rms_norm of [..., D], of any strides, that autograd differentiates once."""
    result: Tensor = _RMSNorm.apply(x, gain_D, epsilon)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, epsilon: float) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1]).contiguous()
        y_ND, rstd_N = rms_norm(x_ND, gain_D, epsilon)
        ctx.save_for_backward(x_ND, rstd_N, gain_D)
        return y_ND.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, rstd_N, gain_D = ctx.saved_tensors
        dgain_D = torch.zeros_like(gain_D, dtype=statistics_dtype(gain_D.dtype))
        dx_ND = rms_norm_backward(
            dy.reshape(x_ND.shape).contiguous(), x_ND, rstd_N, gain_D, dgain_D
        )
        return dx_ND.view(dy.shape), dgain_D.to(gain_D.dtype), None
