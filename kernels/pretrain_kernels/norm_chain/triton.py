"""The norm chain as Triton kernels: one program for a row, or one that walks over rows.

A row sits in one block of the next power of two. The width is a compile-time constant, so vectors
that lie wholly beyond the row cost nothing.
"""

# N rows x tokens  D width; in kernels, capitals are pointers and compile-time constants

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain_kernels.column_sums_triton import add_columns
from pretrain_kernels.fp8 import Fp8, empty_fp8
from pretrain_kernels.launch import next_power_of_2, num_walkers, num_warps
from pretrain_kernels.norm_chain.reference import Chained
from pretrain_kernels.quantize_rows.triton import quantized, scale_of_row

# Elements a thread of the forward kernels: results/micro.csv, norm_chain at 4096x5280 (86 % of a
# copy's bandwidth). Other numbers: kernels/benchmarks/tune.py --only norm_chain
FORWARD_ELEMENTS = 32
# Of the walking programs: elements a thread, rows in flight or in work, and programs a
# multiprocessor by the number of norms. At 32 elements a thread has 243 registers with two norms
# and 128 with one (tests/kernels/test_compiled.py), so 8 and 16 warps fit; with 16 elements a
# thread the instructions of a row are 1.5 times as many, because more of the block lies beyond the
# row. results/micro.csv, norm_chain backward at 4096x5280: 59 % of a copy's bandwidth, where 16
# elements, two rows and one program had 34 %. Other numbers: tune.py --only norm_chain
BACKWARD_ELEMENTS = 32
BACKWARD_STAGES = 3
BACKWARD_PROGRAMS = {1: 2, 2: 1}


@triton.jit
def _load(POINTER, offset, inside):
    return tl.load(POINTER + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _rounded(x, STORAGE: tl.constexpr):
    """R: rounded to the storage dtype. Products are always taken in float32."""
    return x.to(STORAGE).to(tl.float32)


@triton.jit
def _rstd(x, epsilon, D: tl.constexpr):
    return tl.rsqrt(tl.sum(x * x, 0) / D + epsilon)


@triton.jit
def _norm(x, rstd, gain, STORAGE: tl.constexpr):
    return _rounded(_rounded(x * rstd, STORAGE) * gain, STORAGE)


@triton.jit
def _chain_row(
    BRANCH,
    RESIDUAL,
    RSTD,
    GAIN,
    GAIN_A,
    GAIN_B,
    SUM,
    RSTD_A,
    OUT,
    RSTD_B,
    SCALE,
    epsilon,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pointers of what is absent are None, at compile time."""
    STORAGE: tl.constexpr = RESIDUAL.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    offset = row * D + column
    x = _load(RESIDUAL, offset, inside)
    if RSTD is not None:
        x = _norm(x, tl.load(RSTD + row), _load(GAIN, column, inside), STORAGE)
    if BRANCH is not None:
        x = _rounded(_load(BRANCH, offset, inside) + x, STORAGE)
    if SUM is not None:
        tl.store(SUM + offset, x.to(STORAGE), mask=inside)
    if GAIN_A is not None:
        rstd_a = _rstd(x, epsilon, D)
        tl.store(RSTD_A + row, rstd_a)
        x = _norm(x, rstd_a, _load(GAIN_A, column, inside), STORAGE)
    if GAIN_B is not None:
        rstd_b = _rstd(x, epsilon, D)
        tl.store(RSTD_B + row, rstd_b)
        x = _norm(x, rstd_b, _load(GAIN_B, column, inside), STORAGE)
    if SCALE is not None:
        narrow = x.to(STORAGE)
        scale = scale_of_row(narrow)
        tl.store(SCALE + row, scale)
        x = quantized(narrow, scale)
    tl.store(OUT + offset, x.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _output_row(SUM, RSTD_A, GAIN_A, RSTD_B, GAIN_B, OUT, D: tl.constexpr, BLOCK: tl.constexpr):
    STORAGE: tl.constexpr = SUM.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    x = _load(SUM, row * D + column, inside)
    if GAIN_A is not None:
        x = _norm(x, tl.load(RSTD_A + row), _load(GAIN_A, column, inside), STORAGE)
    if GAIN_B is not None:
        x = _norm(x, tl.load(RSTD_B + row), _load(GAIN_B, column, inside), STORAGE)
    tl.store(OUT + row * D + column, x.to(STORAGE), mask=inside)


@triton.jit
def _norm_backward(dy, normed, rstd, gain, inside, D: tl.constexpr):
    """The gradient of x for y = normed * gain, normed = x * rstd(x)."""
    g = _within(dy * gain, inside)
    return rstd * (g - normed * (tl.sum(g * normed, 0) / D))


@triton.jit
def _within(x, inside):
    """x, known to be zero beyond the row: the compiler drops what vectors there would compute.

    It does not know that of loads. A row of 5,280 in a block of 8,192 has a quarter of them.
    """
    return tl.where(inside, x, 0.0)


@triton.jit
def _walk_backward(
    DOUT,
    DX,
    SUM,
    RSTD_A,
    GAIN_A,
    RSTD_B,
    GAIN_B,
    DSUM,
    DGAIN_A,
    DGAIN_B,
    rows,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows p, p + PROGRAMS, ...; DGAIN_A and DGAIN_B hold one row of partial sums a program."""
    STORAGE: tl.constexpr = SUM.dtype.element_ty
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < D
    # In 16 bits, and before the loop, where the pipeline would copy them once a row.
    if GAIN_A is not None:
        gain_a = tl.load(GAIN_A + column, mask=inside, other=0.0)
    if GAIN_B is not None:
        gain_b = tl.load(GAIN_B + column, mask=inside, other=0.0)
    dgain_a = tl.zeros((BLOCK,), tl.float32)
    dgain_b = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(program.to(tl.int64), rows, PROGRAMS, num_stages=STAGES):
        start = row * D
        x = _load(SUM, start + column, inside)
        dx = _load(DOUT, start + column, inside)
        if GAIN_A is not None:
            rstd_a = tl.load(RSTD_A + row)
            normed_a = _within(_rounded(x * rstd_a, STORAGE), inside)
            x = _within(_rounded(normed_a * gain_a.to(tl.float32), STORAGE), inside)
        if GAIN_B is not None:
            rstd_b = tl.load(RSTD_B + row)
            normed_b = _within(_rounded(x * rstd_b, STORAGE), inside)
            dx = _within(dx, inside)
            if DGAIN_B is not None:
                dgain_b += dx * normed_b
            dx = _norm_backward(dx, normed_b, rstd_b, gain_b.to(tl.float32), inside, D)
        if DX is not None:
            dx += _load(DX, start + column, inside)
        if GAIN_A is not None:
            dx = _within(dx, inside)
            if DGAIN_A is not None:
                dgain_a += dx * normed_a
            dx = _norm_backward(dx, normed_a, rstd_a, gain_a.to(tl.float32), inside, D)
        tl.store(DSUM + start + column, dx.to(STORAGE), mask=inside)
    if DGAIN_A is not None:
        tl.store(DGAIN_A + program * D + column, dgain_a, mask=inside)
    if DGAIN_B is not None:
        tl.store(DGAIN_B + program * D + column, dgain_b, mask=inside)


def norm_chain(
    branch_ND: Tensor | None,
    residual_ND: Tensor,
    *,
    rstd_N: Tensor | None = None,
    gain_D: Tensor | None = None,
    gain_a_D: Tensor | None = None,
    gain_b_D: Tensor | None = None,
    epsilon: float,
    sum_out: Tensor | None = None,
    out: Tensor | Fp8 | None = None,
    fp8: bool = False,
) -> Chained:
    """As pretrain_kernels.norm_chain says."""
    rows, width = residual_ND.shape
    if sum_out is None and (branch_ND is not None or rstd_N is not None):
        sum_out = torch.empty_like(residual_ND)
    rstd_a_N = None if gain_a_D is None else _statistics(residual_ND)
    rstd_b_N = None if gain_b_D is None else _statistics(residual_ND)
    if out is None:
        device = residual_ND.device
        out = empty_fp8(rows, width, device) if fp8 else torch.empty_like(residual_ND)
    values_ND, scale_N1 = out if isinstance(out, Fp8) else (out, None)
    block = next_power_of_2(width)
    if rows:
        with torch.cuda.device_of(residual_ND):
            _chain_row[(rows,)](
                branch_ND,
                residual_ND,
                rstd_N,
                gain_D,
                gain_a_D,
                gain_b_D,
                sum_out,
                rstd_a_N,
                values_ND,
                rstd_b_N,
                scale_N1,
                epsilon,
                D=width,
                BLOCK=block,
                num_warps=num_warps(block, elements_per_thread=FORWARD_ELEMENTS),
                # a fused multiply-add would skip the rounding of a float32 product before its sum
                enable_fp_fusion=False,
            )
    return Chained(residual_ND if sum_out is None else sum_out, rstd_a_N, out, rstd_b_N)


def norm_chain_output(
    sum_ND: Tensor,
    rstd_a_N: Tensor | None,
    gain_a_D: Tensor | None,
    rstd_b_N: Tensor | None,
    gain_b_D: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """As pretrain_kernels.norm_chain says."""
    rows, width = sum_ND.shape
    if out is None:
        out = torch.empty_like(sum_ND)
    block = next_power_of_2(width)
    if rows:
        with torch.cuda.device_of(sum_ND):
            _output_row[(rows,)](
                sum_ND,
                rstd_a_N,
                gain_a_D,
                rstd_b_N,
                gain_b_D,
                out,
                D=width,
                BLOCK=block,
                num_warps=num_warps(block, elements_per_thread=FORWARD_ELEMENTS),
            )
    return out


def norm_chain_backward(
    dout_ND: Tensor,
    dx_ND: Tensor | None,
    sum_ND: Tensor,
    *,
    rstd_a_N: Tensor | None,
    gain_a_D: Tensor | None,
    rstd_b_N: Tensor | None,
    gain_b_D: Tensor | None,
    dgain_a_D: Tensor | None = None,
    dgain_b_D: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As pretrain_kernels.norm_chain says."""
    rows, width = sum_ND.shape
    if out is None:
        out = torch.empty_like(sum_ND)
    if not rows:
        return out
    block = next_power_of_2(width)
    norms = (gain_a_D is not None) + (gain_b_D is not None)
    programs = num_walkers(block, rows, BACKWARD_PROGRAMS[norms])
    partials = [
        None if dgain_D is None else dgain_D.new_empty(programs, width)
        for dgain_D in (dgain_a_D, dgain_b_D)
    ]
    with torch.cuda.device_of(sum_ND):
        _walk_backward[(programs,)](
            dout_ND,
            dx_ND,
            sum_ND,
            rstd_a_N,
            gain_a_D,
            rstd_b_N,
            gain_b_D,
            out,
            *partials,
            rows,
            D=width,
            BLOCK=block,
            PROGRAMS=programs,
            STAGES=BACKWARD_STAGES,
            num_warps=num_warps(block, elements_per_thread=BACKWARD_ELEMENTS),
        )
        for dgain_D, partial_PD in zip((dgain_a_D, dgain_b_D), partials, strict=True):
            if dgain_D is not None and partial_PD is not None:
                add_columns(partial_PD, dgain_D)
    return out


def _statistics(x_ND: Tensor) -> Tensor:
    return torch.empty(x_ND.shape[0], dtype=torch.float32, device=x_ND.device)
