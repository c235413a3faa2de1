"""Row-wise quantization in plain PyTorch."""

# N rows  D width

import torch
from torch import Tensor

from pretrain_kernels.fp8 import LARGEST, SMALLEST_SCALE, Fp8
from pretrain_kernels.operands import deliver


def quantize_rows(x_ND: Tensor, out: Fp8 | None = None) -> Fp8:
    """As pretrain_kernels.quantize_rows says."""
    wide_ND = x_ND.to(torch.float32)
    # The product, because PyTorch divides by a constant exactly on CPUs and by such a product on
    # GPUs. clamp keeps NaN.
    scale_N1 = (wide_ND.abs().amax(1, keepdim=True) * (1.0 / LARGEST)).clamp(min=SMALLEST_SCALE)
    values_ND = (wide_ND * (1.0 / scale_N1)).to(torch.float8_e4m3fn)
    if out is None:
        return Fp8(values_ND, scale_N1)
    return Fp8(deliver(values_ND, out.values_ND), deliver(scale_N1, out.scale_N1))
