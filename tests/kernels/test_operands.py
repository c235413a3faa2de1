"""What the ops refuse, each with the number that was given and the one that would be right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain_kernels.fp8 import Fp8, empty_fp8
from pretrain_kernels.norm_chain import norm_chain, norm_chain_backward, norm_chain_output
from pretrain_kernels.qk_rope import qk_rope_, qk_rope_backward
from pretrain_kernels.quantize_both_ways import quantize_both_ways
from pretrain_kernels.quantize_rows import quantize_rows
from pretrain_kernels.rms_norm import rms_norm
from pretrain_kernels.swiglu import swiglu, swiglu_backward

X, GAIN, RSTD = torch.zeros(4, 8), torch.ones(8), torch.ones(4)
STRIDED = torch.zeros(8, 4).t()
QKV, COS = torch.zeros(6, 3, 2, 4), torch.ones(6, 2)
DQ = torch.zeros(2, 3, 2, 4)
FP8 = empty_fp8(4, 8, torch.device("cpu"))
NORMS = {"rstd_a_N": RSTD, "gain_a_D": GAIN, "rstd_b_N": None, "gain_b_D": None}


def chain(branch: Tensor | None = X, residual: Tensor = X, **more: Any) -> Any:
    return norm_chain(branch, residual, **{"gain_a_D": GAIN, "epsilon": 1e-6} | more)


def backward(dout: Tensor = X, dx: Tensor | None = None, **more: Any) -> Tensor:
    return norm_chain_backward(dout, dx, X, **NORMS | more)


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: chain(residual=STRIDED), r"residual_ND of shape \(4, 8\) has strides \(1, 4\)"),
    (lambda: chain(STRIDED), "branch_ND of shape"),
    (lambda: chain(torch.zeros(4, 9)), r"branch_ND has shape \(4, 9\): it must be \(4, 8\)"),
    (lambda: chain(X.double()), "branch_ND is torch.float64: it must be torch.float32"),
    (lambda: chain(X[0], X[0]), r"residual_ND has shape \(8,\): it needs 2 dimensions"),
    (lambda: chain(residual=X.int()), "residual_ND is torch.int32: it must be one of"),
    (lambda: chain(X.to("meta")), "branch_ND is on meta: it must be on cpu"),
    (lambda: chain(gain_a_D=GAIN[:4]), r"gain_a_D has shape \(4,\): it must be \(8,\)"),
    (lambda: chain(gain_b_D=GAIN.half()), "gain_b_D is torch.float16"),
    (lambda: chain(gain_a_D=None), "neither gain_a_D nor gain_b_D"),
    (lambda: chain(rstd_N=RSTD), "rstd_N and gain_D belong together"),
    (lambda: chain(rstd_N=RSTD.half(), gain_D=GAIN), "rstd_N is torch.float16"),
    (lambda: chain(out=FP8), "out is a Fp8, which does not go with fp8=False"),
    (lambda: chain(out=X, fp8=True), "out is a Tensor, which does not go with fp8=True"),
    (lambda: chain(out=Fp8(FP8[0], RSTD), fp8=True), r"out.scale_N1 has shape \(4,\)"),
    (lambda: chain(out=X, sum_out=X), "the same memory"),
    (lambda: chain(None, X, out=X), "the same memory"),
    (lambda: backward(STRIDED), "dout_ND of shape"),
    (lambda: backward(dx=X.half()), "dx_ND is torch.float16"),
    (lambda: backward(rstd_a_N=None), "rstd_a_N and gain_a_D belong together"),
    (lambda: backward(rstd_a_N=None, gain_a_D=None), "there is no norm"),
    (lambda: backward(dgain_b_D=GAIN), "dgain_b_D is given, but gain_b_D is not"),
    (lambda: backward(dgain_a_D=GAIN.double()), "dgain_a_D is torch.float64"),
    (lambda: norm_chain_output(X, None, None, None, None), "there is no norm"),
    (lambda: norm_chain_output(X, RSTD, GAIN, None, None, STRIDED), "out of shape"),
    (lambda: rms_norm(STRIDED, GAIN, 1e-6), "residual_ND of shape"),
    (lambda: quantize_rows(STRIDED), "x_ND of shape"),
    (lambda: quantize_rows(X, FP8._replace(values_ND=X)), "out.values_ND is torch.float32"),
    (lambda: quantize_both_ways(STRIDED), "x_ND of shape"),
    (lambda: quantize_both_ways(X, (FP8, FP8)), r"out\[1\].values_ND has shape .* it must be"),
    (lambda: swiglu(STRIDED), "gate_up_N2I of shape"),
    (lambda: swiglu(torch.zeros(4, 7)), "so its length must be even"),
    (lambda: swiglu(X, torch.zeros(4, 8)), r"out has shape \(4, 8\): it must be \(4, 4\)"),
    (lambda: swiglu(X, fp8=True, out=X), "does not go with fp8=True"),
    (lambda: swiglu_backward(X, X), r"dh_NI has shape \(4, 8\): it must be \(4, 4\)"),
    (lambda: swiglu_backward(X[:, :4], X), "dh_NI of shape"),
    (lambda: swiglu_backward(X[:, :4].clone(), X, out=STRIDED), "out of shape"),
    (lambda: qk_rope_(QKV[:, :2].clone(), None, COS, COS), "so it must be 3"),
    (lambda: qk_rope_(QKV.transpose(0, 2), None, COS, COS), "qkv_N3HK of shape"),
    (lambda: qk_rope_(QKV, GAIN, COS, COS), r"bias_2HK has shape \(8,\): it must be \(2, 2, 4\)"),
    (lambda: qk_rope_(QKV, None, COS.half(), COS), "cos_NP is torch.float16"),
    (lambda: qk_rope_(QKV, None, COS, COS[:5]), r"sin_NP has shape \(5, 2\)"),
    (lambda: qk_rope_(torch.zeros(6, 3, 2, 5), None, COS, COS), "it must be even"),
    (
        lambda: qk_rope_backward(DQ, DQ, torch.zeros(2, 3, 4, 2).transpose(2, 3), COS, COS),
        "dv_BTHK has strides",
    ),
    (lambda: qk_rope_backward(DQ, DQ[:1], DQ, COS, COS), "dk_BTHK has shape"),
    (lambda: qk_rope_backward(DQ, DQ.half(), DQ, COS, COS), "dk_BTHK is torch.float16"),
    (lambda: qk_rope_backward(DQ[0], DQ, DQ, COS, COS), "it needs 4 dimensions"),
    (lambda: qk_rope_backward(DQ, DQ, DQ, COS, COS, dbias_2HK=GAIN), "dbias_2HK has shape"),
    (lambda: qk_rope_backward(DQ, DQ, DQ, COS, COS, out=DQ), r"it must be \(6, 3, 2, 4\)"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_wrong_operands_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_refused_here_is_right_otherwise() -> None:
    """The operands above are good ones, each spoiled in one way."""
    chain()
    chain(rstd_N=RSTD, gain_D=GAIN, gain_b_D=GAIN, out=FP8, fp8=True)
    chain(X[:0], X[:0], out=X[:0].clone(), sum_out=X[:0].clone())
    chain(None, X.clone(), out=X.clone())
    backward(dx=X, dgain_a_D=torch.zeros(8))
    norm_chain_output(X, RSTD, GAIN, None, None)
    swiglu_backward(X[:, :4].clone(), X.clone())
    qk_rope_(QKV.clone(), torch.zeros(2, 2, 4), COS, COS)
    qk_rope_backward(DQ, DQ, DQ, COS, COS, dbias_2HK=torch.zeros(2, 2, 4))
