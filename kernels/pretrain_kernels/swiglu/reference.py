"""SwiGLU in plain PyTorch, forward and backward, in any floating-point dtype."""

# N rows x tokens  I inner width

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain_kernels.fp8 import Fp8
from pretrain_kernels.operands import deliver, statistics_dtype
from pretrain_kernels.quantize_rows.reference import quantize_rows


def swiglu(
    gate_up_N2I: Tensor, out: Tensor | Fp8 | None = None, *, fp8: bool = False
) -> Tensor | Fp8:
    """As pretrain_kernels.swiglu says."""
    gate_NI, up_NI = gate_up_N2I.chunk(2, dim=1)
    h_NI = F.silu(gate_NI) * up_NI
    if fp8:
        assert out is None or isinstance(out, Fp8)
        return quantize_rows(h_NI, out)
    assert out is None or isinstance(out, Tensor)
    return deliver(h_NI, out)


def swiglu_backward(
    dh_NI: Tensor,
    gate_up_N2I: Tensor,
    *,
    out: Tensor | None = None,
    hidden_out: Tensor | None = None,
) -> Tensor:
    """As pretrain_kernels.swiglu_backward says."""
    dtype = gate_up_N2I.dtype
    wide = statistics_dtype(dtype)
    gate_NI, up_NI = gate_up_N2I.to(wide).chunk(2, dim=1)
    wide_dh_NI = dh_NI.to(wide)
    sigmoid_NI = torch.sigmoid(gate_NI)
    silu_NI = F.silu(gate_NI)
    rounded_NI = silu_NI.to(dtype)
    dgate_NI = wide_dh_NI * up_NI * (sigmoid_NI + silu_NI * (1 - sigmoid_NI))
    dup_NI = wide_dh_NI * rounded_NI
    if hidden_out is not None:
        hidden_out.copy_(rounded_NI * up_NI.to(dtype))
    return deliver(torch.cat([dgate_NI, dup_NI], 1).to(dtype), out)
