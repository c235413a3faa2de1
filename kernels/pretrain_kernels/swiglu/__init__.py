"""SiLU(gate) * up on the output of one projection that makes both (arXiv 2002.05202)."""

# N rows x tokens  I inner width; a row of N2I is the gate's I values, then the up's

from types import ModuleType

from torch import Tensor

from pretrain_kernels.dispatch import choose
from pretrain_kernels.fp8 import Fp8, check_fp8
from pretrain_kernels.operands import check_like, check_rows
from pretrain_kernels.swiglu import reference

__all__ = ["swiglu", "swiglu_backward"]


def swiglu(
    gate_up_N2I: Tensor, out: Tensor | Fp8 | None = None, *, fp8: bool = False
) -> Tensor | Fp8:
    """h_NI = R(R(SiLU(gate)) * up), R rounding to the dtype of gate_up_N2I.

    With `fp8`, quantize_rows(h_NI) instead.

    Raises ValueError for wrong shapes, dtypes or strides.
    """
    inner = _check_gate_up(gate_up_N2I)
    rows = gate_up_N2I.shape[0]
    if out is not None and isinstance(out, Fp8) != fp8:
        raise ValueError(f"out is a {type(out).__name__}, which does not go with fp8={fp8}")
    if isinstance(out, Fp8):
        check_fp8("out", out, (rows, inner), gate_up_N2I)
    else:
        check_like("out", out, (rows, inner), gate_up_N2I.dtype, gate_up_N2I)
    return _implementation(gate_up_N2I).swiglu(gate_up_N2I, out, fp8=fp8)


def swiglu_backward(
    dh_NI: Tensor,
    gate_up_N2I: Tensor,
    *,
    out: Tensor | None = None,
    hidden_out: Tensor | None = None,
) -> Tensor:
    """The gradient of gate_up_N2I, given that of h; h itself, bit for bit, into hidden_out.

    With s = SiLU(gate) and sigma = sigmoid(gate): dgate = R(dh up (sigma + s (1 - sigma))) and
    dup = R(dh R(s)). `out` may be gate_up_N2I, hidden_out may be dh_NI.

    Raises ValueError for wrong shapes, dtypes or strides.
    """
    inner = _check_gate_up(gate_up_N2I)
    rows = gate_up_N2I.shape[0]
    for name, tensor in (("dh_NI", dh_NI), ("hidden_out", hidden_out)):
        check_like(name, tensor, (rows, inner), gate_up_N2I.dtype, gate_up_N2I)
    check_like("out", out, gate_up_N2I.shape, gate_up_N2I.dtype, gate_up_N2I)
    return _implementation(gate_up_N2I).swiglu_backward(
        dh_NI, gate_up_N2I, out=out, hidden_out=hidden_out
    )


def _check_gate_up(gate_up_N2I: Tensor) -> int:
    """The inner width."""
    check_rows("gate_up_N2I", gate_up_N2I)
    if gate_up_N2I.shape[1] % 2:
        raise ValueError(
            f"gate_up_N2I has shape {tuple(gate_up_N2I.shape)}: a row is the gate and the up,"
            " of one width each, so its length must be even"
        )
    return gate_up_N2I.shape[1] // 2


def _implementation(tensor: Tensor) -> ModuleType:
    if choose("swiglu", tensor):
        from pretrain_kernels.swiglu import triton

        return triton
    return reference
