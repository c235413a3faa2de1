"""The ops of the recurrent core between its products: norms, rotary positions, SwiGLU, fp8."""

# N tokens  D width  I inner width  H heads  K head width  P = K / 2 pairs

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from micro_ops.case import (
    Case,
    Inputs,
    Outputs,
    Prepare,
    Run,
    Sizes,
    backward_of,
    compiled,
    forward_of,
    normal,
    with_liger,
)
from pretrain.model.rotary import angles, rotate
from pretrain_kernels.fp8 import LARGEST, Fp8
from pretrain_kernels.norm_chain import norm_chain, norm_chain_backward
from pretrain_kernels.qk_rope import qk_rope_, qk_rope_backward
from pretrain_kernels.quantize_both_ways import quantize_both_ways
from pretrain_kernels.quantize_rows import quantize_rows
from pretrain_kernels.rms_norm import rms_norm, rms_norm_backward
from pretrain_kernels.swiglu import swiglu, swiglu_backward

EPSILON = 1e-6


def cases(sizes: Sizes) -> Iterator[Case]:
    """All of them, in bfloat16."""
    yield from _norm_cases(sizes)
    yield from _rope_cases(sizes)
    yield from _swiglu_cases(sizes)
    yield from _fp8_cases(sizes)


def _case(op: str, sizes: Sizes, shape: str, bytes_per_token: int, **fields) -> Case:
    return Case(
        op=op, shape=f"{sizes.tokens}x{shape}", dtype=torch.bfloat16, size=sizes.tokens,
        amount=sizes.tokens * bytes_per_token, limit="copy", **fields,
    )  # fmt: skip


def _three(function, ours: Prepare) -> dict[str, Prepare]:
    return {
        "ours": ours, "eager": forward_of(function), "torch.compile": forward_of(compiled(function))
    }  # fmt: skip


def _three_backward(function, ours: Prepare, *names: tuple[str, ...]) -> dict[str, Prepare]:
    return {
        "ours": ours,
        "eager": backward_of(function, *names),
        "torch.compile": backward_of(compiled(function), *names),
    }


def norm(x_ND: Tensor, gain_D: Tensor) -> Tensor:
    """As the model's, in plain PyTorch."""
    wide_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
    rstd_N1 = torch.rsqrt(wide_ND.square().mean(-1, keepdim=True) + EPSILON)
    return (wide_ND * rstd_N1).to(x_ND.dtype) * gain_D


def _norm_inputs(width: int, tokens: int, device: torch.device) -> Inputs:
    names = ("branch", "residual", "dout", "dx")
    inputs = {name: normal(tokens, width, device=device) for name in names}
    return inputs | {name: 1 + 0.2 * normal(width, device=device) for name in ("gain_a", "gain_b")}


def _one(inputs: Inputs) -> Outputs:
    return (norm(inputs["residual"], inputs["gain_a"]),)


def _chain(inputs: Inputs) -> Outputs:
    total_ND = inputs["branch"] + inputs["residual"]
    return total_ND, norm(norm(total_ND, inputs["gain_a"]), inputs["gain_b"])


def _chain_from_sum(inputs: Inputs) -> Outputs:
    state_ND = norm(inputs["residual"], inputs["gain_a"])
    return norm(state_ND, inputs["gain_b"]), state_ND


def _our_chain(inputs: Inputs, *, fp8: bool = False) -> Outputs:
    chained = norm_chain(
        inputs["branch"], inputs["residual"], gain_a_D=inputs["gain_a"],
        gain_b_D=inputs["gain_b"], epsilon=EPSILON, fp8=fp8,
    )  # fmt: skip
    out = chained.out_ND
    return (chained.sum_ND, *out) if isinstance(out, Fp8) else (chained.sum_ND, out)


def _our_norm_backward(inputs: Inputs) -> Run:
    x_ND, gain_D = inputs["residual"], inputs["gain_a"]
    _, rstd_N = rms_norm(x_ND, gain_D, EPSILON)
    dgain_D = torch.zeros_like(gain_D, dtype=torch.float32)
    return lambda: (rms_norm_backward(inputs["dout"], x_ND, rstd_N, gain_D, dgain_D), dgain_D)


def _our_chain_backward(inputs: Inputs) -> Run:
    gains = inputs["gain_a"], inputs["gain_b"]
    chained = norm_chain(
        None, inputs["residual"], gain_a_D=gains[0], gain_b_D=gains[1], epsilon=EPSILON
    )
    sums = [torch.zeros_like(gain, dtype=torch.float32) for gain in gains]
    return lambda: (
        norm_chain_backward(
            inputs["dout"], inputs["dx"], chained.sum_ND, rstd_a_N=chained.rstd_a_N,
            gain_a_D=gains[0], rstd_b_N=chained.rstd_b_N, gain_b_D=gains[1],
            dgain_a_D=sums[0], dgain_b_D=sums[1],
        ),
        *sums,
    )  # fmt: skip


def _liger_norm(inputs: Inputs) -> Outputs:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # 0: offset of the gain; False: do not overwrite the gradient that comes in
    arguments = (inputs["residual"], inputs["gain_a"], EPSILON, 0.0, "llama", False)
    return (LigerRMSNormFunction.apply(*arguments),)


def _is_liger_there() -> None:
    import liger_kernel  # noqa: F401


def _liger_forward(function) -> Prepare:
    _is_liger_there()
    return forward_of(function)


def _liger_backward(function, *names: tuple[str, ...]) -> Prepare:
    _is_liger_there()
    return backward_of(function, *names)


def _norm_cases(sizes: Sizes) -> Iterator[Case]:
    make = partial(_norm_inputs, sizes.width)
    shape, d = str(sizes.width), sizes.width
    ours = forward_of(lambda i: (rms_norm(i["residual"], i["gain_a"], EPSILON)[0],))
    providers = with_liger(_three(_one, ours), lambda: _liger_forward(_liger_norm))
    yield _case("rms_norm", sizes, shape, 4 * d, make=make, providers=providers)
    names = ("residual", "gain_a"), ("dout",)
    providers = _three_backward(_one, _our_norm_backward, *names)
    providers = with_liger(providers, lambda: _liger_backward(_liger_norm, *names))
    yield _case("rms_norm backward", sizes, shape, 6 * d, make=make, providers=providers)
    providers = _three(_chain, forward_of(_our_chain))
    yield _case("norm_chain", sizes, shape, 8 * d, make=make, providers=providers)
    names = ("residual", "gain_a", "gain_b"), ("dout", "dx")
    providers = _three_backward(_chain_from_sum, _our_chain_backward, *names)
    yield _case("norm_chain backward", sizes, shape, 8 * d, make=make, providers=providers)


def _rope_inputs(sizes: Sizes, tokens: int, device: torch.device) -> Inputs:
    heads, head_width = sizes.heads, sizes.head_width
    positions_1N = torch.arange(tokens, device=device)[None]
    cos_1NP, sin_1NP = angles(positions_1N, head_width=head_width, base=50_000.0)
    # as attention's backward pass returns them: heads before tokens
    gradients = {
        name: normal(1, heads, tokens, head_width, device=device) for name in ("dq", "dk", "dv")
    }
    return gradients | {
        "qkv": normal(tokens, 3, heads, head_width, device=device),
        "bias": 0.1 * normal(2, heads, head_width, device=device),
        "cos": cos_1NP[0],
        "sin": sin_1NP[0],
    }


def _rope(inputs: Inputs) -> Outputs:
    q_1NHK, k_1NHK, v_1NHK = inputs["qkv"][None].unbind(2)
    angles_1NP = inputs["cos"][None], inputs["sin"][None]
    q_1NHK = rotate(q_1NHK + inputs["bias"][0], *angles_1NP)
    k_1NHK = rotate(k_1NHK + inputs["bias"][1], *angles_1NP)
    return tuple(x_1NHK.transpose(1, 2) for x_1NHK in (q_1NHK, k_1NHK, v_1NHK))


def _our_rope(inputs: Inputs) -> Outputs:
    qkv_N3HK = qk_rope_(inputs["qkv"], inputs["bias"], inputs["cos"], inputs["sin"])
    return tuple(x_NHK.transpose(0, 1)[None] for x_NHK in qkv_N3HK.unbind(1))


def _our_rope_backward(inputs: Inputs) -> Run:
    gradients = [inputs[name].transpose(1, 2) for name in ("dq", "dk", "dv")]
    dbias_2HK = torch.zeros_like(inputs["bias"], dtype=torch.float32)
    angles_NP = inputs["cos"], inputs["sin"]
    return lambda: (qk_rope_backward(*gradients, *angles_NP, dbias_2HK=dbias_2HK), dbias_2HK)


def _rope_cases(sizes: Sizes) -> Iterator[Case]:
    d, make = sizes.width, partial(_rope_inputs, sizes)
    shape = f"3x{sizes.heads}x{sizes.head_width}"
    providers = _three(_rope, forward_of(_our_rope))
    yield _case("qk_rope", sizes, shape, 8 * d, make=make, providers=providers)
    names = ("qkv", "bias"), ("dq", "dk", "dv")
    providers = _three_backward(_rope, _our_rope_backward, *names)
    yield _case("qk_rope backward", sizes, shape, 12 * d, make=make, providers=providers)


def _swiglu_inputs(inner: int, tokens: int, device: torch.device) -> Inputs:
    return {
        "gate_up": normal(tokens, 2 * inner, device=device),
        "dh": normal(tokens, inner, device=device),
    }


def _swiglu(inputs: Inputs) -> Outputs:
    gate_NI, up_NI = inputs["gate_up"].chunk(2, dim=-1)
    return (F.silu(gate_NI) * up_NI,)


def _liger_swiglu(inputs: Inputs) -> Outputs:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return (LigerSiLUMulFunction.apply(*inputs["gate_up"].chunk(2, dim=-1)),)


def _our_swiglu_backward(inputs: Inputs) -> Run:
    hidden_NI = torch.empty_like(inputs["dh"])
    return lambda: (swiglu_backward(inputs["dh"], inputs["gate_up"], hidden_out=hidden_NI),)


def _swiglu_cases(sizes: Sizes) -> Iterator[Case]:
    inner, make = sizes.inner, partial(_swiglu_inputs, sizes.inner)
    shape = str(2 * inner)
    providers = _three(_swiglu, forward_of(lambda inputs: (swiglu(inputs["gate_up"]),)))
    providers = with_liger(providers, lambda: _liger_forward(_liger_swiglu))
    yield _case("swiglu", sizes, shape, 6 * inner, make=make, providers=providers)
    names = ("gate_up",), ("dh",)
    providers = _three_backward(_swiglu, _our_swiglu_backward, *names)
    providers = with_liger(providers, lambda: _liger_backward(_liger_swiglu, *names))
    # ours also writes h again, which the others have kept since the forward pass
    yield _case("swiglu backward", sizes, shape, 12 * inner, make=make, providers=providers)


def _quantize(x_ND: Tensor) -> Outputs:
    wide_ND = x_ND.float()
    scale_N1 = wide_ND.abs().amax(1, keepdim=True).clamp(min=1e-30) / LARGEST
    return (wide_ND / scale_N1).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale_N1


def _transposed_copy(inputs: Inputs) -> Outputs:
    """What quantize_both_ways replaces: a transposed copy, and each quantized."""
    weight_OI = inputs["weight"]
    return (*quantize_rows(weight_OI), *quantize_rows(weight_OI.t().contiguous()))


def _both_ways_case(sizes: Sizes) -> Case:
    """Of the largest weight."""
    rows, d = 2 * sizes.inner, sizes.width

    def make(size: int, device: torch.device) -> Inputs:
        return {"weight": normal(size, d, device=device)}

    def plain(inputs: Inputs) -> Outputs:
        return (*_quantize(inputs["weight"]), *_quantize(inputs["weight"].t().contiguous()))

    def ours(inputs: Inputs) -> Outputs:
        by_row, by_column = quantize_both_ways(inputs["weight"])
        return (*by_row, *by_column)

    def restored(outputs: Outputs) -> Outputs:
        return (*_restored(outputs[:2]), *_restored(outputs[2:]))

    return Case(
        op="quantize_both_ways", shape=f"{rows}x{d}", dtype=torch.bfloat16, size=rows,
        # read twice, because no scale is known before the last element of its row and column
        amount=6.0 * rows * d, limit="copy", make=make, compared=restored,
        providers=_three(plain, forward_of(ours)) | {"copy": forward_of(_transposed_copy)},
        exact=forward_of(lambda inputs: (inputs["weight"], inputs["weight"].t())),
    )  # fmt: skip


def _restored(outputs: Outputs) -> Outputs:
    *others, values_ND, scale_N1 = outputs
    return (*others, values_ND.double() * scale_N1)


def _fp8_cases(sizes: Sizes) -> Iterator[Case]:
    d, inner = sizes.width, sizes.inner
    make_norms = partial(_norm_inputs, d)
    ours = forward_of(lambda inputs: tuple(quantize_rows(inputs["residual"])))
    yield _case(
        "quantize_rows", sizes, str(d), 3 * d, make=make_norms,
        providers=_three(lambda inputs: _quantize(inputs["residual"]), ours),
        exact=forward_of(lambda inputs: (inputs["residual"],)), compared=_restored,
    )  # fmt: skip

    yield _both_ways_case(sizes)

    def chain(inputs: Inputs) -> Outputs:
        total_ND, out_ND = _chain(inputs)
        return (total_ND, *_quantize(out_ND))

    ours = forward_of(partial(_our_chain, fp8=True))
    yield _case(
        "norm_chain fp8", sizes, str(d), 7 * d, make=make_norms, providers=_three(chain, ours),
        exact=forward_of(_chain), compared=_restored,
    )  # fmt: skip
    ours = forward_of(lambda inputs: tuple(swiglu(inputs["gate_up"], fp8=True)))
    yield _case(
        "swiglu fp8", sizes, str(2 * inner), 5 * inner, make=partial(_swiglu_inputs, inner),
        providers=_three(lambda inputs: _quantize(*_swiglu(inputs)), ours),
        exact=forward_of(_swiglu), compared=_restored,
    )  # fmt: skip
