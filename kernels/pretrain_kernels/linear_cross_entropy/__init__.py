"""Cross-entropy of the output layer, without ever holding all logits or their gradient."""

# N tokens  D width  V vocabulary

from types import ModuleType

import torch
from torch import Tensor

from pretrain_kernels.dispatch import choose
from pretrain_kernels.linear_cross_entropy import reference
from pretrain_kernels.linear_cross_entropy.chunked import ChunkedLinearCrossEntropy

IGNORED = reference.IGNORED


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int = 8192,
) -> Tensor:
    """Nats of each token, float32 (float64 for float64), of the logits hidden @ weight.T.

    Logits are rounded to the type of `hidden`, all else is float32. To each token's nats
    z_loss x (log-sum-exp)^2 is added. Labels of -100 give 0 nats and no gradient; any other
    label outside [0, V) gives NaN in both, since an error would need a synchronization.
    Every token may have its own upstream gradient. Not twice differentiable. The logits of
    chunk_tokens tokens are in memory at a time; those of all chunks but the last are made twice.

    Raises ValueError for other types, shapes or strides. Source: arXiv 2410.10989 (chunks).
    """
    _check(hidden_ND, weight_VD, labels_N, chunk_tokens)
    softmax = softmax_for(hidden_ND)
    return ChunkedLinearCrossEntropy.apply(
        hidden_ND, weight_VD, labels_N, z_loss, chunk_tokens, softmax
    )


def softmax_for(tensor: Tensor) -> ModuleType:
    """The module with the two passes over logits of this type, on this device."""
    if choose("linear_cross_entropy", tensor):
        from pretrain_kernels.linear_cross_entropy import triton

        return triton
    return reference


def _check(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, chunk_tokens: int) -> None:
    types = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    if hidden_ND.dtype not in types or weight_VD.dtype != hidden_ND.dtype:
        raise ValueError(
            f"linear_cross_entropy: hidden is {hidden_ND.dtype} and weight {weight_VD.dtype}; "
            f"both must be the same of {', '.join(str(dtype) for dtype in types)}."
        )
    if labels_N.dtype != torch.int64:
        raise ValueError(f"linear_cross_entropy: labels are {labels_N.dtype}, not torch.int64.")
    shapes = [tuple(tensor.shape) for tensor in (hidden_ND, weight_VD, labels_N)]
    is_plausible = [len(shape) for shape in shapes] == [2, 2, 1]
    if not is_plausible or shapes[0] != (shapes[2][0], shapes[1][1]):
        raise ValueError(
            f"linear_cross_entropy: hidden {shapes[0]}, weight {shapes[1]}, labels {shapes[2]}; "
            "they must be (N, D), (V, D) and (N,)."
        )
    for name, tensor in (("hidden", hidden_ND), ("weight", weight_VD), ("labels", labels_N)):
        if not tensor.is_contiguous():
            raise ValueError(
                f"linear_cross_entropy: {name} {tuple(tensor.shape)} has strides "
                f"{tensor.stride()}; it must be contiguous."
            )
        if tensor.device != hidden_ND.device:
            raise ValueError(
                f"linear_cross_entropy: {name} is on {tensor.device}, hidden on {hidden_ND.device}."
            )
    if chunk_tokens < 1:
        raise ValueError(f"linear_cross_entropy: chunk_tokens={chunk_tokens} must be at least 1.")
