"""Attention without autograd: which kernel runs, its forward, and its backward.

Each backend is a pair of functions on [B, H, T, K] views of the packed projection, so nothing is
copied to reach it. Which one is best at the model's shapes was measured:
kernels/benchmarks/results/micro.csv.

FlexAttention alone has no public backward pass. There autograd records that one op, on views that
belong to nobody else: it keeps q, k and v (the packed projection), the output and the logarithms of
sums of exponentials, which is what the other backends keep, and nothing is run again.
"""

# B rows  T tokens  H heads  K head width

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch._dynamo.config as dynamo_config
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from pretrain.model.layout import Layout
from pretrain_kernels.dispatch import has_triton

log = logging.getLogger(__name__)

_aten = torch.ops.aten
# queries and keys of a block of FlexAttention's mask, torch's default
BLOCK = 128
# Graphs that torch may make of FlexAttention, instead of 8. Each mask has one for the first number
# of rows, for any number and for one; two masks in a process, or two models, may need a ninth.
GRAPHS = 64


class Attended(NamedTuple):
    """What attention gave, and what its backward pass needs besides q, k and v."""

    mixed_BHTK: Tensor
    statistics: tuple[Any, ...]


@dataclass(frozen=True)
class Backend:
    """One attention kernel and its backward pass."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Layout], Attended]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def choose_backend(q_BHTK: Tensor, layout: Layout) -> Backend:
    """The kernel for this dtype, device and mask; said once in the log."""
    if not q_BHTK.is_cuda:
        backend = CPU if layout.mask.is_causal else REPLAYED
    elif q_BHTK.dtype.itemsize != 2 or q_BHTK.shape[-1] % 8:
        # no kernel here takes head widths that are no multiple of 8: torch pads them
        backend = REPLAYED
    elif not layout.mask.is_causal:
        backend = FLEX if _is_for_flex(q_BHTK) else REPLAYED
    elif torch.are_deterministic_algorithms_enabled():
        # which cuDNN refuses
        backend = FLASH
    else:
        backend = CUDNN
    _announce(backend.name, q_BHTK.device.type, layout.mask.is_causal)
    return backend


def _is_for_flex(q_BHTK: Tensor) -> bool:
    """Whether FlexAttention is compiled for these heads on a GPU.

    Triton compiles it, for products of 16 channels or more. Rows to train on are whole blocks;
    items of an evaluation have any length, and would be compiled over and over.
    """
    _, _, tokens, head_width = q_BHTK.shape
    return has_triton() and head_width >= 16 and tokens % BLOCK == 0


@functools.cache
def _announce(name: str, device: str, is_causal: bool) -> None:
    mask = "causal" if is_causal else "masked"
    log.info("%s attention on %s runs by %s", mask, device, name)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Attended:
    mixed, *statistics = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, True, False
    )
    return Attended(mixed, tuple(statistics[:-1]))


def _cudnn_backward(
    dmixed: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    logsumexp, sequences_q, sequences_k, max_q, max_k, seed, offset = attended.statistics
    gradients: tuple[Tensor, Tensor, Tensor] = (
        _aten._scaled_dot_product_cudnn_attention_backward(
            dmixed, q, k, v, attended.mixed_BHTK, logsumexp, seed, offset, None,
            sequences_q, sequences_k, max_q, max_k, 0.0, True,
        )
    )  # fmt: skip
    return gradients


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Attended:
    mixed, *statistics = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False)
    return Attended(mixed, tuple(statistics[:-1]))


def _flash_backward(
    dmixed: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    logsumexp, sequences_q, sequences_k, max_q, max_k, seed, offset = attended.statistics
    gradients: tuple[Tensor, Tensor, Tensor] = (
        _aten._scaled_dot_product_flash_attention_backward(
            dmixed, q, k, v, attended.mixed_BHTK, logsumexp, sequences_q, sequences_k,
            max_q, max_k, 0.0, True, seed, offset,
        )
    )  # fmt: skip
    return gradients


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Attended:
    mixed, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    return Attended(mixed, (logsumexp,))


def _cpu_backward(
    dmixed: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = (
        _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dmixed, q, k, v, attended.mixed_BHTK, *attended.statistics, 0.0, True
        )
    )
    return gradients


def _flex_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Attended:
    # Asked each time, because torch 2.13 has a limit for each thread, and iterations are computed
    # again in autograd's.
    if dynamo_config.recompile_limit < GRAPHS:
        dynamo_config.recompile_limit = GRAPHS
    with torch.enable_grad():
        leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
        recorded = _flex(q.device.type)(*leaves, block_mask=layout.blocks)
    return Attended(recorded.detach(), (recorded, leaves))


def _flex_backward(
    dmixed: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    recorded, leaves = attended.statistics
    dq, dk, dv = torch.autograd.grad(recorded, leaves, dmixed)
    return _by_channel(dq), _by_channel(dk), _by_channel(dv)


@functools.cache
def _flex(device: str) -> Callable[..., Any]:
    """Compiled for GPUs: for the rows of the first call, for any number of rows, and for one row.

    Elsewhere the op as it is, in plain PyTorch; nobody is sent there but by tests.
    """
    if device != "cuda":
        return flex_attention
    # fullgraph: one compilation too many is an error, and not the plain op, in silence
    compiled: Callable[..., Any] = torch.compile(flex_attention, fullgraph=True)
    return compiled


def _replayed_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Attended:
    mask = None if layout.mask.is_causal else layout.matrix
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return Attended(mixed, ())


def _replayed_backward(
    dmixed: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        mixed, _ = _replayed_forward(q, k, v, layout)
    dq, dk, dv = torch.autograd.grad(mixed, (q, k, v), dmixed)
    # where torch multiplies matrices itself, it gives the gradient of keys transposed
    return _by_channel(dq), _by_channel(dk), _by_channel(dv)


def _by_channel(gradient_BHTK: Tensor) -> Tensor:
    """The same with a head's channels beside each other in memory, copied only if needed."""
    return gradient_BHTK if gradient_BHTK.stride(-1) == 1 else gradient_BHTK.contiguous()


CUDNN = Backend("cuDNN", _cudnn_forward, _cudnn_backward)
FLASH = Backend("FlashAttention 2", _flash_forward, _flash_backward)
CPU = Backend("the CPU's flash kernel", _cpu_forward, _cpu_backward)
FLEX = Backend("FlexAttention", _flex_forward, _flex_backward)
# Any mask, any dtype: torch picks the kernel, and the backward pass runs it once more.
REPLAYED = Backend("torch's choice, run again in the backward pass", _replayed_forward,
                   _replayed_backward)  # fmt: skip
