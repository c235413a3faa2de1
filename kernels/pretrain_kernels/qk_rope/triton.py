"""Bias and rotary positions as Triton kernels, forward in place and backward into the packed form.

A token's queries and keys are 2 x H x K flat values in which pair j uses angle j mod P: heads
are not padded to powers of two.
"""

# B rows  T tokens  N = B x T  H heads  K head width  P = K / 2 pairs
# in kernels, capitals are pointers and compile-time constants

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain_kernels.column_sums_triton import add_columns

# Forward: 16 bytes of bf16 for each of 128 threads; 10,560 = 10.3 x 1,024. results/micro.csv,
# qk_rope at 4096x3x55x96: 84 % of a copy's bandwidth.
PAIRS, NUM_WARPS = 512, 4
# Programs that walk over tokens, for each block of columns. A constant, because they sum the
# bias's gradient on the way and their number decides how it is rounded.
WALKERS = 64
# Tokens of a walking program in flight or in work, its pairs and its warps: 8 pairs of a token a
# thread. Compiled for sm_90 that is 163 instructions, where 4 warps have 108 for 4 pairs.
# results/micro.csv, qk_rope backward at 4096x3x55x96: 68 % of a copy's bandwidth, 61 % before.
# Other numbers, not yet run: kernels/benchmarks/tune.py --only qk_rope
BACKWARD_STAGES, BACKWARD_PAIRS, BACKWARD_WARPS = 3, 512, 2


@triton.jit
def _turn(x, COS, SIN, angle, inside, SIGN: tl.constexpr, PAIRS: tl.constexpr):
    """Pairs of x turned by SIGN times their angles, in float32."""
    cos = tl.load(COS + angle, mask=inside, other=0.0)
    sin = tl.load(SIN + angle, mask=inside, other=0.0) * SIGN
    even, odd = tl.split(tl.reshape(x, (PAIRS, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (2 * PAIRS,))


@triton.jit
def _rope_forward(
    QKV,
    BIAS,
    COS,
    SIN,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCKS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    STORAGE: tl.constexpr = QKV.dtype.element_ty
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    pair = block * PAIRS + tl.arange(0, PAIRS)
    channel = block * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)
    inside = channel < 4 * H * P
    pointer = QKV + token * (6 * H * P) + channel
    x = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    if BIAS is not None:
        x += tl.load(BIAS + channel, mask=inside, other=0.0).to(tl.float32)
        x = x.to(STORAGE).to(tl.float32)
    x = _turn(x, COS, SIN, token * P + pair % P, pair < 2 * H * P, 1, PAIRS)
    tl.store(pointer, x.to(STORAGE), mask=inside)


@triton.jit
def _walk_part(
    GRADIENT,
    stride_b,
    stride_t,
    stride_h,
    COS,
    SIN,
    OUT,
    DBIAS,
    rows,
    tokens,
    PART: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Tokens p, p + PROGRAMS, ... of each row: some columns of queries (0), keys or values (2)."""
    walker = tl.program_id(2)
    block = tl.program_id(0)
    pair = block * PAIRS + tl.arange(0, PAIRS)
    channel = block * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)
    inside = channel < 2 * H * P
    column = (channel // (2 * P)).to(tl.int64) * stride_h + channel % (2 * P)
    total = tl.zeros((2 * PAIRS,), tl.float32)
    # two loops, because a division of the token's number takes longer than its rotation
    for row in range(rows):
        start = GRADIENT + tl.cast(row, tl.int64) * stride_b
        for token in tl.range(walker, tokens, PROGRAMS, num_stages=STAGES):
            pointer = start + tl.cast(token, tl.int64) * stride_t + column
            x = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
            number = tl.cast(row, tl.int64) * tokens + token
            if PART < 2:
                x = _turn(x, COS, SIN, number * P + pair % P, pair < H * P, -1, PAIRS)
                total += x
            place = (number * 3 + PART) * (2 * H * P) + channel
            tl.store(OUT + place, x.to(OUT.dtype.element_ty), mask=inside)
    if PART < 2 and DBIAS is not None:
        tl.store(DBIAS + (walker * 2 + PART) * (2 * H * P) + channel, total, mask=inside)


@triton.jit
def _rope_backward(
    DQ,
    DK,
    DV,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    COS,
    SIN,
    OUT,
    DBIAS,
    rows,
    tokens,
    H: tl.constexpr,
    P: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
    PAIRS: tl.constexpr,
):
    # Each branch keeps its own pointer, whose alignment the compiler would not know of a choice.
    part = tl.program_id(1)
    if part == 0:
        _walk_part(
            DQ, q_b, q_t, q_h, COS, SIN, OUT, DBIAS, rows, tokens,
            0, H, P, PROGRAMS, STAGES, PAIRS,
        )  # fmt: skip
    elif part == 1:
        _walk_part(
            DK, k_b, k_t, k_h, COS, SIN, OUT, DBIAS, rows, tokens,
            1, H, P, PROGRAMS, STAGES, PAIRS,
        )  # fmt: skip
    else:
        _walk_part(
            DV, v_b, v_t, v_h, COS, SIN, OUT, DBIAS, rows, tokens,
            2, H, P, PROGRAMS, STAGES, PAIRS,
        )  # fmt: skip


def qk_rope_(qkv_N3HK: Tensor, bias_2HK: Tensor | None, cos_NP: Tensor, sin_NP: Tensor) -> Tensor:
    """As pretrain_kernels.qk_rope says."""
    rows, _, heads, head_width = qkv_N3HK.shape
    blocks = triton.cdiv(heads * head_width, PAIRS)
    if rows:
        with torch.cuda.device_of(qkv_N3HK):
            _rope_forward[(rows * blocks,)](
                qkv_N3HK,
                bias_2HK,
                cos_NP,
                sin_NP,
                H=heads,
                P=head_width // 2,
                BLOCKS=blocks,
                PAIRS=PAIRS,
                num_warps=NUM_WARPS,
                # plain PyTorch rounds each product; a fused multiply-add would not
                enable_fp_fusion=False,
            )
    return qkv_N3HK


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
    """As pretrain_kernels.qk_rope says."""
    rows, tokens, heads, head_width = dq_BTHK.shape
    if out is None:
        out = dq_BTHK.new_empty(rows * tokens, 3, heads, head_width)
    if not out.numel():
        return out
    programs = min(WALKERS, tokens)
    partial_P2HK = (
        None if dbias_2HK is None else dbias_2HK.new_empty(programs, 2, heads, head_width)
    )
    gradients = (dq_BTHK, dk_BTHK, dv_BTHK)
    blocks = triton.cdiv(heads * head_width, 2 * BACKWARD_PAIRS)
    with torch.cuda.device_of(dq_BTHK):
        _rope_backward[(blocks, 3, programs)](
            *gradients,
            *(stride for gradient in gradients for stride in gradient.stride()[:3]),
            cos_NP,
            sin_NP,
            out,
            partial_P2HK,
            rows,
            tokens,
            H=heads,
            P=head_width // 2,
            PROGRAMS=programs,
            STAGES=BACKWARD_STAGES,
            PAIRS=BACKWARD_PAIRS,
            num_warps=BACKWARD_WARPS,
        )
        if dbias_2HK is not None and partial_P2HK is not None:
            add_columns(partial_P2HK.view(programs, -1), dbias_2HK.view(-1))
    return out
