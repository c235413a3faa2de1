"""Attention, which we leave to others: which of them, and how fast, causal and within documents.

All read strided views of the packed projection; a backward pass includes packing what it gives.
"""

# T tokens  H heads  W head width

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from micro_ops.case import Case, Inputs, Outputs, Prepare, Run, Sizes, forward_of, normal
from pretrain.model.layout import Layout, Mask

# Inputs, products and probabilities are rounded to bfloat16, each by at most 2^-9 of itself; in
# backward the gradients of the probabilities are too.
BOUND, BACKWARD_BOUND = 2.0**-7, 2.0**-6
CHECK_TOKENS = 512
# Of a row of 4096; of other rows in proportion.
DOCUMENT_TOKENS = (1000, 96, 1500, 260, 1240)


def cases(sizes: Sizes) -> Iterator[Case]:
    """Forward and backward, of one row."""
    tokens = sizes.tokens
    causal = {
        "cuDNN": forward_of(partial(_by, SDPBackend.CUDNN_ATTENTION)),
        "FA2": forward_of(partial(_by, SDPBackend.FLASH_ATTENTION)),
        # every score in memory: what a fused kernel saves
        "math": forward_of(partial(_by, SDPBackend.MATH)),
    }
    lengths = [length * tokens / sum(DOCUMENT_TOKENS) for length in DOCUMENT_TOKENS]
    documents = {"FlexAttention": _flex, "dense mask": _dense}
    for op, is_isolated, pairs, providers in (
        ("attention", False, tokens**2 / 2, causal),
        ("attention in documents", True, sum(length**2 for length in lengths) / 2, documents),
    ):
        exact = forward_of(partial(_plain, is_isolated))
        for suffix, wrap, products, bound in (
            ("", lambda prepare: prepare, 2, BOUND),
            (" backward", _backward, 5, BACKWARD_BOUND),
        ):
            yield Case(
                op=op + suffix, shape=f"1x{sizes.heads}x{tokens}x{sizes.head_width} packed",
                dtype=torch.bfloat16, size=tokens, limit="gemm", bound=bound,
                check_size=min(tokens, CHECK_TOKENS),
                # of pairs that see each other; a kernel that computes more gains nothing by it
                amount=2.0 * products * sizes.heads * sizes.head_width * pairs,
                make=partial(_packed, sizes), exact=wrap(exact),
                providers={name: wrap(prepare) for name, prepare in providers.items()},
            )  # fmt: skip


def _packed(sizes: Sizes, tokens: int, device: torch.device) -> Inputs:
    index_T = torch.arange(tokens, device=device)
    ends = torch.tensor(DOCUMENT_TOKENS, device=device).cumsum(0) * tokens // sum(DOCUMENT_TOKENS)
    return {
        "qkv": normal(tokens, 3, sizes.heads, sizes.head_width, device=device),
        "dout": normal(tokens, sizes.heads, sizes.head_width, device=device),
        "segments": torch.bucketize(index_T, ends, right=True),
    }


def _heads_first(qkv_T3HW: Tensor) -> list[Tensor]:
    """Strided views [1, H, T, W] of the packed projection."""
    return [x_THW.transpose(0, 1)[None] for x_THW in qkv_T3HW.unbind(1)]


def _layout(inputs: Inputs, *, is_isolated: bool) -> Layout:
    positions_1T = torch.arange(len(inputs["qkv"]), device=inputs["qkv"].device)[None]
    mask = Mask(inputs["segments"][None]) if is_isolated else Mask()
    return Layout.at(positions_1T, mask, head_width=inputs["qkv"].shape[-1], base=50_000.0)


def _plain(is_isolated: bool, inputs: Inputs) -> Outputs:
    q_1HTW, k_1HTW, v_1HTW = _heads_first(inputs["qkv"])
    scores_1HTT = q_1HTW @ k_1HTW.transpose(-1, -2) / q_1HTW.shape[-1] ** 0.5
    is_seen_11TT = _layout(inputs, is_isolated=is_isolated).matrix
    weights_1HTT = scores_1HTT.masked_fill(~is_seen_11TT, -torch.inf).softmax(-1)
    return ((weights_1HTT @ v_1HTW)[0].transpose(0, 1),)


def _by(backend: SDPBackend, inputs: Inputs) -> Outputs:
    with sdpa_kernel(backend):
        out_1HTW = F.scaled_dot_product_attention(*_heads_first(inputs["qkv"]), is_causal=True)
    return (out_1HTW[0].transpose(0, 1),)


def _dense(inputs: Inputs) -> Run:
    """The kernel that torch takes for a matrix of booleans, which is built before."""
    matrix_11TT = _layout(inputs, is_isolated=True).matrix

    def run() -> Outputs:
        heads = _heads_first(inputs["qkv"])
        out_1HTW = F.scaled_dot_product_attention(*heads, attn_mask=matrix_11TT)
        return (out_1HTW[0].transpose(0, 1),)

    return run


def _flex(inputs: Inputs) -> Run:
    """With the mask of the model, built before; on a CPU, which only checks, without a compiler."""
    is_gpu = inputs["qkv"].is_cuda
    attend = torch.compile(flex_attention, dynamic=False) if is_gpu else flex_attention
    blocks = _layout(inputs, is_isolated=True).blocks

    def run() -> Outputs:
        out_1HTW = attend(*_heads_first(inputs["qkv"]), block_mask=blocks)
        return (out_1HTW[0].transpose(0, 1),)

    return run


def _backward(forward: Prepare) -> Prepare:
    def prepare(inputs: Inputs) -> Run:
        qkv_T3HW = inputs["qkv"].detach().requires_grad_()
        outputs = forward(inputs | {"qkv": qkv_T3HW})()
        return lambda: torch.autograd.grad(outputs, qkv_T3HW, inputs["dout"], retain_graph=True)

    return prepare
