"""Matrix products with weights, and the sums of weight gradients over many uses of one weight."""

# N rows x tokens  I inputs  O outputs of a weight

import functools
import logging
from typing import Self

import torch
from torch import Tensor

from pretrain_kernels.fp8 import Fp8
from pretrain_kernels.quantize_rows import quantize_rows

log = logging.getLogger(__name__)


def project(x_NI: Tensor | Fp8, weight_OI: Tensor | Fp8) -> Tensor:
    """x W^T: [N, O] in the dtype of x; bf16 where both are rows of float8 with their scales."""
    if isinstance(x_NI, Fp8):
        assert isinstance(weight_OI, Fp8)
        if not x_NI.values_ND.is_cuda:
            _announce_emulation(str(x_NI.values_ND.device))
            return torch.mm(widen(x_NI), widen(weight_OI).t()).to(torch.bfloat16)
        return torch._scaled_mm(
            x_NI.values_ND,
            weight_OI.values_ND.t(),
            scale_a=x_NI.scale_N1,
            scale_b=weight_OI.scale_N1.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    assert isinstance(weight_OI, Tensor)
    return torch.mm(x_NI, weight_OI.t())


@functools.cache
def _announce_emulation(device: str) -> None:
    log.warning(
        "float8 products on %s are computed in float32 from the same float8 numbers, which saves "
        "no time: only GPUs multiply float8",
        device,
    )


def input_gradient(dy_NO: Tensor, weight_OI: Tensor, weight_IO: Fp8 | None) -> Tensor:
    """dy W: [N, I], where y = x W^T; in float8 if the transposed weight is given so."""
    if weight_IO is None:
        return torch.mm(dy_NO, weight_OI)
    return project(quantize_rows(dy_NO), weight_IO)


def widen(narrow: Fp8) -> Tensor:
    """What the float8 values stand for, in float32."""
    return narrow.values_ND.float() * narrow.scale_N1


class GradientSums:
    """The gradients of some tensors, each a sum over its uses, given out once.

    Sums of matrices of 16 bits are float32 inside the matrix product itself: no use is rounded
    before the end.
    """

    def __init__(self, uses: int) -> None:
        """`uses`: how often each matrix is used; once needs no wide sum."""
        self.is_wide = uses > 1
        self.sums: dict[int, Tensor] = {}

    def add_product(
        self, weight_OI: Tensor, dy_NO: Tensor, x_NI: Tensor, columns: slice | None = None
    ) -> None:
        """Add dy^T x to the gradient of a matrix that made y = x W^T, or of some columns of it."""
        key, wide = id(weight_OI), self._wide(weight_OI)
        is_new = key not in self.sums
        if is_new and columns is not None:
            self.sums[key] = torch.zeros_like(weight_OI, dtype=wide)
            is_new = False
        is_wider = dy_NO.dtype.itemsize < wide.itemsize
        if is_wider and not dy_NO.is_cuda:
            # only CUDA multiplies 16 bits into 32
            dy_NO, x_NI, is_wider = dy_NO.to(wide), x_NI.to(wide), False
        if is_new:
            self.sums[key] = (
                torch.mm(dy_NO.t(), x_NI, out_dtype=wide) if is_wider else torch.mm(dy_NO.t(), x_NI)
            )
            return
        total_OI = self.sums[key] if columns is None else self.sums[key][:, columns]
        if is_wider:
            torch.addmm(total_OI, dy_NO.t(), x_NI, out_dtype=wide, out=total_OI)
        else:
            total_OI.addmm_(dy_NO.t(), x_NI)

    def _wide(self, weight: Tensor) -> torch.dtype:
        """What a matrix's gradient is summed in."""
        if not self.is_wide:
            return weight.dtype
        return torch.promote_types(weight.dtype, torch.float32)

    def vector(self, parameter: Tensor) -> Tensor:
        """The sum of a gain or bias, for kernels to add to: float32, float64 for float64."""
        key = id(parameter)
        if key not in self.sums:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            self.sums[key] = torch.zeros_like(parameter, dtype=wide)
        return self.sums[key]

    def take(self, parameter: Tensor) -> Tensor | None:
        """The finished gradient in the parameter's dtype; forgotten here. None if never used."""
        total = self.sums.pop(id(parameter), None)
        return None if total is None else total.to(parameter.dtype)

    @classmethod
    def once(cls) -> Self:
        """For matrices that are used once in a backward pass."""
        return cls(uses=1)
