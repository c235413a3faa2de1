"""Bias and rotary positions of queries and keys, in place in the packed projection.

Adjacent pairs of a head's channels are rotated, as in the model's rotary.py; angles come one
set a token, so documents may restart their positions.
"""

# B rows  T tokens  N = B x T  H heads  K head width  P = K / 2 pairs; 3: queries, keys, values

from types import ModuleType

import torch
from torch import Tensor

from pretrain_kernels.dispatch import choose
from pretrain_kernels.operands import (
    check_kind,
    check_like,
    check_rows,
    check_storage,
    statistics_dtype,
)
from pretrain_kernels.qk_rope import reference

__all__ = ["qk_rope_", "qk_rope_backward"]


def qk_rope_(qkv_N3HK: Tensor, bias_2HK: Tensor | None, cos_NP: Tensor, sin_NP: Tensor) -> Tensor:
    """Queries and keys become rotate(R(x + bias)) in place; values stay. Returns qkv_N3HK.

    R rounds to the dtype of qkv_N3HK, which the bias shares. The rotation is float32 and its
    result is rounded once; cos_NP and sin_NP are float32.

    Raises ValueError for wrong shapes, dtypes or strides.
    """
    check_rows("qkv_N3HK", qkv_N3HK, dimensions=4)
    rows, three, heads, head_width = qkv_N3HK.shape
    if three != 3:
        raise ValueError(
            f"qkv_N3HK has shape {tuple(qkv_N3HK.shape)}: its second dimension holds queries,"
            " keys and values, so it must be 3"
        )
    check_like("bias_2HK", bias_2HK, (2, heads, head_width), qkv_N3HK.dtype, qkv_N3HK)
    _check_angles(cos_NP, sin_NP, rows, head_width, qkv_N3HK)
    return _implementation(qkv_N3HK).qk_rope_(qkv_N3HK, bias_2HK, cos_NP, sin_NP)


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
    """The gradient of qkv_N3HK, packed: dq and dk rotated back, dv as it is.

    The three may have any strides as long as K is contiguous: attention returns transposed
    views. The rotation is float32, its result rounded once. The bias's gradient is the sum over
    tokens of the float32 values *before* that rounding, added to dbias_2HK (float32), always in
    the same order.

    Raises ValueError for wrong shapes, dtypes or strides.
    """
    check_storage("dq_BTHK", dq_BTHK, dimensions=4)
    rows, tokens, heads, head_width = dq_BTHK.shape
    for name, tensor in (("dq_BTHK", dq_BTHK), ("dk_BTHK", dk_BTHK), ("dv_BTHK", dv_BTHK)):
        check_kind(name, tensor, dq_BTHK.shape, dq_BTHK.dtype, dq_BTHK)
        if tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} has strides {tensor.stride()}: its last dimension must be contiguous"
            )
    wide = statistics_dtype(dq_BTHK.dtype)
    _check_angles(cos_NP, sin_NP, rows * tokens, head_width, dq_BTHK)
    check_like("dbias_2HK", dbias_2HK, (2, heads, head_width), wide, dq_BTHK)
    check_like("out", out, (rows * tokens, 3, heads, head_width), dq_BTHK.dtype, dq_BTHK)
    return _implementation(dq_BTHK).qk_rope_backward(
        dq_BTHK, dk_BTHK, dv_BTHK, cos_NP, sin_NP, dbias_2HK=dbias_2HK, out=out
    )


def _check_angles(
    cos_NP: Tensor, sin_NP: Tensor, rows: int, head_width: int, model: Tensor
) -> None:
    if head_width % 2:
        raise ValueError(f"a head is {head_width} wide: pairs are rotated, so it must be even")
    # float64 angles go with float64 data only
    wide = statistics_dtype(model.dtype)
    dtype = torch.float64 if wide == cos_NP.dtype == torch.float64 else torch.float32
    for name, angles in (("cos_NP", cos_NP), ("sin_NP", sin_NP)):
        check_like(name, angles, (rows, head_width // 2), dtype, model)


def _implementation(tensor: Tensor) -> ModuleType:
    if choose("qk_rope", tensor):
        from pretrain_kernels.qk_rope import triton

        return triton
    return reference
