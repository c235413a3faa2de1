"""The sandwich-norm chain: a residual sum, the norm of that sum, and the next norm, in one pass.

The residual stream x is carried as (sum, rstd): the sum before its norm and that norm's
1 / RMS. Whoever needs x recomputes it, bit for bit, so x is never written to memory.

Source: the norms are those of arXiv 2502.05171 (section 3) and 1910.07467.
"""

# N rows x tokens  D width

from types import ModuleType

from torch import Tensor

from pretrain_kernels.dispatch import choose
from pretrain_kernels.fp8 import Fp8, check_fp8
from pretrain_kernels.norm_chain import reference
from pretrain_kernels.norm_chain.reference import Chained
from pretrain_kernels.operands import check_like, check_rows, statistics_dtype

__all__ = ["Chained", "norm_chain", "norm_chain_backward", "norm_chain_output"]


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
    """The sum, its norm's 1 / RMS, the output and the output norm's 1 / RMS.

    With R rounding to the dtype of residual_ND, and 1 / RMS in float32:
        x   = residual                           or R(R(residual * rstd) * gain) if rstd_N is given
        sum = R(branch + x)                      or x without a branch
        x'  = R(R(sum * rstd_a) * gain_a)        or sum without gain_a_D
        out = R(R(x' * rstd_b) * gain_b)         or x' without gain_b_D
    With `fp8` the output is quantize_rows(out) instead. `sum_out` may be branch_ND or
    residual_ND, and so may `out`, unless the sum lies there. Where sum is residual_ND and no
    `sum_out` is given, residual_ND is returned.

    Raises ValueError for wrong shapes, dtypes or strides, and if neither gain_a_D nor gain_b_D
    is given, or only one of rstd_N and gain_D.
    """
    check_rows("residual_ND", residual_ND)
    rows, width = residual_ND.shape
    dtype = residual_ND.dtype
    check_like("branch_ND", branch_ND, (rows, width), dtype, residual_ND)
    check_like("rstd_N", rstd_N, (rows,), statistics_dtype(dtype), residual_ND)
    for name, gain in (("gain_D", gain_D), ("gain_a_D", gain_a_D), ("gain_b_D", gain_b_D)):
        check_like(name, gain, (width,), dtype, residual_ND)
    check_like("sum_out", sum_out, (rows, width), dtype, residual_ND)
    is_sum = branch_ND is None and rstd_N is None and sum_out is None
    _check_output(out, fp8, residual_ND if is_sum else sum_out, residual_ND)
    if (rstd_N is None) != (gain_D is None):
        raise ValueError("rstd_N and gain_D belong together: give both or neither")
    if gain_a_D is None and gain_b_D is None:
        raise ValueError("neither gain_a_D nor gain_b_D is given: there is no norm to compute")
    return _implementation(residual_ND).norm_chain(
        branch_ND,
        residual_ND,
        rstd_N=rstd_N,
        gain_D=gain_D,
        gain_a_D=gain_a_D,
        gain_b_D=gain_b_D,
        epsilon=epsilon,
        sum_out=sum_out,
        out=out,
        fp8=fp8,
    )


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
    """The gradient of `sum`, which is that of the branch and that of x, given those of out and x'.

    dx_ND is what reaches x' from later uses of the residual stream (None: nothing does). Where
    x of this chain is itself a norm of an earlier sum, the result enters the earlier chain's
    backward as its dx_ND. x' is recomputed. The gains' gradients are added to the float32
    buffers given for them, always in the same order. `out` may be dout_ND or dx_ND. Everything
    between the inputs and the result is float32, and the result is rounded once.

    Raises ValueError for wrong shapes, dtypes or strides, and for buffers of absent gains.
    """
    check_rows("sum_ND", sum_ND)
    rows, width = sum_ND.shape
    dtype = sum_ND.dtype
    for name, gradient in (("dout_ND", dout_ND), ("dx_ND", dx_ND), ("out", out)):
        check_like(name, gradient, (rows, width), dtype, sum_ND)
    check_norms(sum_ND, rstd_a_N, gain_a_D, rstd_b_N, gain_b_D)
    wide = statistics_dtype(dtype)
    for name, buffer, gain in (
        ("dgain_a_D", dgain_a_D, gain_a_D),
        ("dgain_b_D", dgain_b_D, gain_b_D),
    ):
        check_like(name, buffer, (width,), wide, sum_ND)
        if buffer is not None and gain is None:
            raise ValueError(f"{name} is given, but {name.removeprefix('d')} is not")
    return _implementation(sum_ND).norm_chain_backward(
        dout_ND,
        dx_ND,
        sum_ND,
        rstd_a_N=rstd_a_N,
        gain_a_D=gain_a_D,
        rstd_b_N=rstd_b_N,
        gain_b_D=gain_b_D,
        dgain_a_D=dgain_a_D,
        dgain_b_D=dgain_b_D,
        out=out,
    )


def norm_chain_output(
    sum_ND: Tensor,
    rstd_a_N: Tensor | None,
    gain_a_D: Tensor | None,
    rstd_b_N: Tensor | None,
    gain_b_D: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """The forward's `out`, bit for bit, from what it returned; with the b pair None, x'.

    Raises ValueError for wrong shapes, dtypes or strides, and if there is no norm at all.
    """
    check_rows("sum_ND", sum_ND)
    check_norms(sum_ND, rstd_a_N, gain_a_D, rstd_b_N, gain_b_D)
    check_like("out", out, sum_ND.shape, sum_ND.dtype, sum_ND)
    return _implementation(sum_ND).norm_chain_output(
        sum_ND, rstd_a_N, gain_a_D, rstd_b_N, gain_b_D, out
    )


def check_norms(
    sum_ND: Tensor,
    rstd_a_N: Tensor | None,
    gain_a_D: Tensor | None,
    rstd_b_N: Tensor | None,
    gain_b_D: Tensor | None,
) -> None:
    """Raise ValueError unless the two pairs are whole, fit sum_ND, and one at least is there."""
    rows, width = sum_ND.shape
    for norm, rstd_N, gain_D in (("a", rstd_a_N, gain_a_D), ("b", rstd_b_N, gain_b_D)):
        if (rstd_N is None) != (gain_D is None):
            raise ValueError(f"rstd_{norm}_N and gain_{norm}_D belong together")
        check_like(f"rstd_{norm}_N", rstd_N, (rows,), statistics_dtype(sum_ND.dtype), sum_ND)
        check_like(f"gain_{norm}_D", gain_D, (width,), sum_ND.dtype, sum_ND)
    if gain_a_D is None and gain_b_D is None:
        raise ValueError("neither gain_a_D nor gain_b_D is given: there is no norm")


def _check_output(
    out: Tensor | Fp8 | None, fp8: bool, sum_ND: Tensor | None, model: Tensor
) -> None:
    """`sum_ND` is where the sum will lie, if that is known."""
    if isinstance(out, Fp8) != fp8 and out is not None:
        raise ValueError(f"out is a {type(out).__name__}, which does not go with fp8={fp8}")
    if isinstance(out, Fp8):
        check_fp8("out", out, model.shape, model)
        return
    check_like("out", out, model.shape, model.dtype, model)
    # tensors without elements have the address 0
    if out is not None and sum_ND is not None and out.data_ptr() == sum_ND.data_ptr() != 0:
        raise ValueError("out and the sum are the same memory: one would overwrite the other")


def _implementation(tensor: Tensor) -> ModuleType:
    if choose("norm_chain", tensor):
        from pretrain_kernels.norm_chain import triton

        return triton
    return reference
