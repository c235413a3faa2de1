"""SwiGLU as Triton kernels, forward and backward."""

# N rows x tokens  I inner width; in kernels, capitals are pointers and compile-time constants

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain_kernels.fp8 import Fp8, empty_fp8
from pretrain_kernels.launch import next_power_of_2, num_warps
from pretrain_kernels.quantize_rows.triton import quantized, scale_of_row

# 16 bytes of bf16 for each of 128 threads; 17,920 = 17.5 x 1,024. results/micro.csv, swiglu at
# 4096x35840: 99 and 94 % of a copy's bandwidth.
BLOCK, NUM_WARPS = 1024, 4
# Elements a thread where a whole row is quantized: swiglu fp8 there, 79 %. Other numbers of both:
# kernels/benchmarks/tune.py --only swiglu
FP8_ELEMENTS = 32


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _hidden(silu, up, STORAGE: tl.constexpr):
    """R(R(silu) * up), as float32."""
    return (silu.to(STORAGE).to(tl.float32) * up).to(STORAGE).to(tl.float32)


@triton.jit
def _swiglu_forward(GATE_UP, H, INNER: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    STORAGE: tl.constexpr = GATE_UP.dtype.element_ty
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = column < INNER
    start = GATE_UP + row * (2 * INNER)
    gate = tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + INNER + column, mask=inside, other=0.0).to(tl.float32)
    hidden = _hidden(gate * _sigmoid(gate), up, STORAGE)
    tl.store(H + row * INNER + column, hidden.to(STORAGE), mask=inside)


@triton.jit
def _quantized_row(GATE_UP, VALUES, SCALE, INNER: tl.constexpr, BLOCK: tl.constexpr):
    STORAGE: tl.constexpr = GATE_UP.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < INNER
    start = GATE_UP + row * (2 * INNER)
    gate = tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + INNER + column, mask=inside, other=0.0).to(tl.float32)
    # kept narrow until the scale is known, which halves the registers of a whole row
    hidden = _hidden(gate * _sigmoid(gate), up, STORAGE).to(STORAGE)
    scale = scale_of_row(hidden)
    values = quantized(hidden, scale).to(VALUES.dtype.element_ty)
    tl.store(VALUES + row * INNER + column, values, mask=inside)
    tl.store(SCALE + row, scale)


@triton.jit
def _swiglu_backward(
    DH, GATE_UP, DGATE_UP, H, INNER: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    STORAGE: tl.constexpr = GATE_UP.dtype.element_ty
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    inside = column < INNER
    start = row * (2 * INNER)
    gate = tl.load(GATE_UP + start + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(GATE_UP + start + INNER + column, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(DH + row * INNER + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    if H is not None:
        hidden = _hidden(silu, up, STORAGE)
        tl.store(H + row * INNER + column, hidden.to(STORAGE), mask=inside)
    dgate = dh * up * (sigmoid + silu * (1.0 - sigmoid))
    dup = dh * silu.to(STORAGE).to(tl.float32)
    tl.store(DGATE_UP + start + column, dgate.to(STORAGE), mask=inside)
    tl.store(DGATE_UP + start + INNER + column, dup.to(STORAGE), mask=inside)


def swiglu(
    gate_up_N2I: Tensor, out: Tensor | Fp8 | None = None, *, fp8: bool = False
) -> Tensor | Fp8:
    """As pretrain_kernels.swiglu says."""
    rows, inner = gate_up_N2I.shape[0], gate_up_N2I.shape[1] // 2
    if out is None:
        device = gate_up_N2I.device
        out = empty_fp8(rows, inner, device) if fp8 else gate_up_N2I.new_empty(rows, inner)
    if not rows:
        return out
    with torch.cuda.device_of(gate_up_N2I):
        if isinstance(out, Fp8):
            block = next_power_of_2(inner)
            _quantized_row[(rows,)](
                gate_up_N2I,
                *out,
                INNER=inner,
                BLOCK=block,
                num_warps=num_warps(block, elements_per_thread=FP8_ELEMENTS),
                # two programs share a multiprocessor: one loads while the other computes
                maxnreg=64,
                enable_fp_fusion=False,
            )
        else:
            blocks = triton.cdiv(inner, BLOCK)
            _swiglu_forward[(rows * blocks,)](
                gate_up_N2I, out, INNER=inner, BLOCKS=blocks, BLOCK=BLOCK, num_warps=NUM_WARPS
            )
    return out


def swiglu_backward(
    dh_NI: Tensor,
    gate_up_N2I: Tensor,
    *,
    out: Tensor | None = None,
    hidden_out: Tensor | None = None,
) -> Tensor:
    """As pretrain_kernels.swiglu says."""
    rows, inner = dh_NI.shape
    if out is None:
        out = torch.empty_like(gate_up_N2I)
    blocks = triton.cdiv(inner, BLOCK)
    if rows:
        with torch.cuda.device_of(dh_NI):
            _swiglu_backward[(rows * blocks,)](
                dh_NI,
                gate_up_N2I,
                out,
                hidden_out,
                INNER=inner,
                BLOCKS=blocks,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )
    return out
