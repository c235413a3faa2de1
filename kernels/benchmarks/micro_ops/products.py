"""Matrix products, which we leave to cuBLAS: at which shapes, and how fast."""

# M rows  N columns of the result  K inner

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from micro_ops.case import Case, Inputs, Outputs, Run, Sizes, forward_of, normal
from pretrain_kernels.fp8 import LARGEST

# Half a unit in the last place of bfloat16 is 2^-9; sums of rounded terms stay below twice that.
PRODUCT_BOUND = 2.0**-8
# Hopper adds float8 products in about 14 bits, 32 of them at a time: over the longest sum here,
# 17,920 terms, errors of 2^-14 walk to sqrt(560) times that, which is less than another 2^-9.
FP8_BOUND = 2.0**-7
LIMIT_SIZE, COPY_ELEMENTS = 8192, 1 << 29


def limits() -> Iterator[Case]:
    """What this device does at best, in this run: the yardsticks, named by their limit."""
    yield Case(
        op="copy", shape=str(COPY_ELEMENTS), dtype=torch.bfloat16, size=COPY_ELEMENTS,
        amount=4.0 * COPY_ELEMENTS, limit="", check_size=1 << 20, make=_copy_inputs,
        providers={"torch": _copy}, exact=_copy, bound=0.0,
    )  # fmt: skip
    size = LIMIT_SIZE
    for op, case in (("gemm", product(size, size, size)), ("fp8", product_fp8(size, size, size))):
        yield replace(case, op=op, limit="")


def cases(sizes: Sizes) -> Iterator[Case]:
    """The model's products at one and four sequences; weight gradients and float8 at one."""
    d, inner = sizes.width, sizes.inner
    for rows in (sizes.tokens, 4 * sizes.tokens):
        yield product(rows, 2 * inner, d)
        yield product(rows, 3 * d, d)
        # the awkward width: output of attention, of the adapter, of the MLP, gradient of the MLP
        for depth in (d, 2 * d, inner, 2 * inner):
            yield product(rows, d, depth)
    # into the MLP and attention, and out of them
    for columns, depth in ((2 * inner, d), (3 * d, d), (d, inner), (d, d)):
        yield weight_gradient(columns, depth, sizes.tokens)
        yield product_fp8(sizes.tokens, columns, depth)


def _copy_inputs(elements: int, device: torch.device) -> Inputs:
    return {"source": normal(elements, device=device), "target": normal(elements, device=device)}


def _copy(inputs: Inputs) -> Run:
    # a kernel, as those that are measured are; a memcpy inside a graph is slower
    return lambda: (torch.mul(inputs["source"], 1.0, out=inputs["target"]),)


def _factors(columns: int, inner: int, rows: int, device: torch.device) -> Inputs:
    left_MK, right_NK = normal(rows, inner, device=device), normal(columns, inner, device=device)
    return {"left": left_MK, "right": right_NK}


def _product(inputs: Inputs) -> Outputs:
    return (inputs["left"] @ inputs["right"].t(),)


def product(rows: int, columns: int, inner: int) -> Case:
    """X W^T in bfloat16."""
    return Case(
        op="gemm", shape=f"{rows}x{columns}x{inner}", dtype=torch.bfloat16, size=rows,
        amount=2.0 * rows * columns * inner, limit="gemm", bound=PRODUCT_BOUND,
        make=partial(_factors, columns, inner), providers={"torch": forward_of(_product)},
        exact=forward_of(_product),
    )  # fmt: skip


def weight_gradient(rows: int, columns: int, tokens: int) -> Case:
    """A float32 sum of weight gradients, to which one more is added."""

    def make(size: int, device: torch.device) -> Inputs:
        total = normal(rows, columns, device=device, dtype=torch.float32)
        dy_TM, x_TN = normal(size, rows, device=device), normal(size, columns, device=device)
        return {"total": total, "dy": dy_TM, "x": x_TN}

    def in_one(inputs: Inputs) -> Outputs:
        total, dy_TM, x_TN = inputs.values()
        return (torch.addmm(total, dy_TM.t(), x_TN, out_dtype=torch.float32, out=total),)

    def in_two(inputs: Inputs) -> Outputs:
        return (inputs["total"].add_(inputs["dy"].t() @ inputs["x"]),)

    return Case(
        op="weight gradient, float32 sum", shape=f"{rows}x{columns}x{tokens}",
        dtype=torch.bfloat16, size=tokens, amount=2.0 * rows * columns * tokens, limit="gemm",
        make=make, bound=PRODUCT_BOUND, exact=forward_of(in_two),
        providers={"addmm": forward_of(in_one), "mm, add": forward_of(in_two)},
    )  # fmt: skip


def _rows_of_fp8(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    scale_M1 = x_MK.float().abs().amax(1, keepdim=True) / LARGEST
    return (x_MK.float() / scale_M1).to(torch.float8_e4m3fn), scale_M1


def product_fp8(rows: int, columns: int, inner: int) -> Case:
    """The same of 8-bit rows, each with its scale."""

    def make(size: int, device: torch.device) -> Inputs:
        (left_MK, a_M1), (right_NK, b_N1) = (
            _rows_of_fp8(x) for x in _factors(columns, inner, size, device).values()
        )
        return {"left": left_MK, "a": a_M1, "right": right_NK, "b": b_N1}

    def scaled(inputs: Inputs) -> Outputs:
        result = torch._scaled_mm(
            inputs["left"], inputs["right"].t(), scale_a=inputs["a"], scale_b=inputs["b"].t(),
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip
        return (result,)

    def exact(inputs: Inputs) -> Outputs:
        return ((inputs["left"] * inputs["a"]) @ (inputs["right"] * inputs["b"]).t(),)

    return Case(
        op="gemm fp8, row-wise", shape=f"{rows}x{columns}x{inner}", dtype=torch.float8_e4m3fn,
        size=rows, amount=2.0 * rows * columns * inner, limit="fp8", make=make,
        providers={"torch": forward_of(scaled)}, exact=forward_of(exact), bound=FP8_BOUND,
    )  # fmt: skip
