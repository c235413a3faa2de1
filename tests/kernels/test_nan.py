"""NaN in, NaN out: for every op, in every element that depends on it, and nowhere else.

Which those are says the reference in float64. On a CPU the ops run as their references; on CUDA
(marker gpu), and in a process with TRITON_INTERPRET=1 (test_interpreter.py), as their kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain_kernels.adamw import adamw_
from pretrain_kernels.add_gradient import add_gradient
from pretrain_kernels.dispatch import is_fused, is_interpreted, ops
from pretrain_kernels.ellis_adam import update_moments, update_weights
from pretrain_kernels.linear_cross_entropy import linear_cross_entropy
from pretrain_kernels.norm_chain import norm_chain, norm_chain_backward, norm_chain_output
from pretrain_kernels.operands import statistics_dtype
from pretrain_kernels.qk_rope import qk_rope_, qk_rope_backward
from pretrain_kernels.quantize_both_ways import quantize_both_ways
from pretrain_kernels.quantize_rows import quantize_rows
from pretrain_kernels.spans import Piece, Spans
from pretrain_kernels.square_sums import square_sums
from pretrain_kernels.swiglu import swiglu, swiglu_backward

# N rows  D width  I inner width  B x T tokens  H heads  K head width  V vocabulary
N, D, I, B, T, H, K, V = 3, 24, 16, 1, 3, 2, 8, 11  # noqa: E741
NUMEL = 40
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
# the second GPU while the first one is current
BESIDE = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
DEVICES = [
    "cpu", pytest.param("cuda", marks=ON_GPU), pytest.param("cuda:1", marks=BESIDE)
]  # fmt: skip
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call of an op on tensors of these shapes; what it returns or writes to."""

    op: str
    run: Callable[[Tensors], list[Any]]
    narrow: dict[str, tuple[int, ...]]
    """In the dtype of the weights."""
    wide: dict[str, tuple[int, ...]]
    """In that of sums: float32, or float64 where the others are."""


def spans(like: Tensor) -> Spans:
    return Spans([Piece(0, 0, 30), Piece(1, 30, NUMEL - 30)], 2, like.device)


def chain(t: Tensors, **more: Any) -> list[Any]:
    return list(norm_chain(**t, epsilon=1e-6, **more))


def chain_backward(t: Tensors) -> list[Any]:
    dgains = {
        f"dgain_{norm}_D": torch.zeros(D, dtype=t["rstd_a_N"].dtype, device=t["sum_ND"].device)
        for norm in "ab"
    }
    return [norm_chain_backward(**t, **dgains), *dgains.values()]


def rope_backward(t: Tensors) -> list[Any]:
    dbias = torch.zeros(2, H, K, dtype=t["cos_NP"].dtype, device=t["cos_NP"].device)
    return [qk_rope_backward(**t, dbias_2HK=dbias), dbias]


def gated_backward(t: Tensors) -> list[Any]:
    hidden = torch.empty_like(t["dh_NI"])
    return [swiglu_backward(**t, hidden_out=hidden), hidden]


def head(t: Tensors) -> list[Any]:
    leaves = [t[name].requires_grad_() for name in ("hidden_ND", "weight_VD")]
    labels = torch.arange(N, device=leaves[0].device)
    nats = linear_cross_entropy(*leaves, labels, z_loss=0.1, chunk_tokens=2)
    return [nats, *torch.autograd.grad(nats, leaves, t["upstream_N"])]


def moments(t: Tensors) -> list[Any]:
    sums = update_moments(
        **t, spans=spans(t["mean"]), beta1=0.9, beta2=0.95, floor=1e-2, is_start=False, factor=0.5
    )
    return [sums, t["mean"], t["square"]]


def weights(t: Tensors) -> list[Any]:
    rounded = torch.empty_like(t["weight"], dtype=torch.float16)
    etas = t["etas"].float()
    update_weights(
        t["weight"], t["mean"], t["square"], etas, spans(etas),
        keep=0.9, correction=1.1, rounded=rounded,
    )  # fmt: skip
    return [t["weight"], rounded]


def adamw(t: Tensors) -> list[Any]:
    rounded = torch.empty_like(t["weight"], dtype=torch.float16)
    sums = adamw_(
        **t, spans=spans(t["mean"]), rate=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8,
        weight_decay=0.1, step=2, rounded=rounded,
    )  # fmt: skip
    return [sums, *(t[name] for name in ("weight", "mean", "square")), rounded]


def added(t: Tensors) -> list[Any]:
    first = torch.empty_like(t["total"])
    add_gradient(first, t["gradient"], is_first=True)
    add_gradient(t["total"], t["gradient"], is_first=False)
    return [first, t["total"]]


GAINS = {"gain_a_D": (D,), "gain_b_D": (D,)}
ROOTS = {"rstd_a_N": (N,), "rstd_b_N": (N,)}
BRANCH = {"branch_ND": (N, D), "residual_ND": (N, D), "gain_D": (D,), **GAINS}
ANGLES = {"cos_NP": (N, K // 2), "sin_NP": (N, K // 2)}
FLAT = (NUMEL,)
CASES = {
    "norm chain": Case("norm_chain", chain, BRANCH, {"rstd_N": (N,)}),
    "norm chain, fp8": Case(
        "norm_chain", lambda t: chain(t, fp8=True), BRANCH, {"rstd_N": (N,)}
    ),
    "norm chain backward": Case(
        "norm_chain", chain_backward,
        {"dout_ND": (N, D), "dx_ND": (N, D), "sum_ND": (N, D), **GAINS}, ROOTS,
    ),
    "norm chain output": Case(
        "norm_chain", lambda t: [norm_chain_output(**t)], {"sum_ND": (N, D), **GAINS}, ROOTS
    ),
    "rope": Case(
        "qk_rope", lambda t: [qk_rope_(**t)], {"qkv_N3HK": (N, 3, H, K), "bias_2HK": (2, H, K)},
        ANGLES,
    ),
    "rope backward": Case(
        "qk_rope", rope_backward,
        dict.fromkeys(("dq_BTHK", "dk_BTHK", "dv_BTHK"), (B, T, H, K)), ANGLES,
    ),
    "swiglu": Case("swiglu", lambda t: [swiglu(**t)], {"gate_up_N2I": (N, 2 * I)}, {}),
    "swiglu, fp8": Case(
        "swiglu", lambda t: [swiglu(**t, fp8=True)], {"gate_up_N2I": (N, 2 * I)}, {}
    ),
    "swiglu backward": Case(
        "swiglu", gated_backward, {"dh_NI": (N, I), "gate_up_N2I": (N, 2 * I)}, {}
    ),
    "quantize rows": Case("quantize_rows", lambda t: [quantize_rows(**t)], {"x_ND": (N, D)}, {}),
    "quantize both ways": Case(
        "quantize_both_ways", lambda t: list(quantize_both_ways(**t)), {"x_ND": (N, D)}, {}
    ),
    "linear cross-entropy": Case(
        "linear_cross_entropy", head, {"hidden_ND": (N, D), "weight_VD": (V, D)},
        {"upstream_N": (N,)},
    ),
    "moments": Case(
        "ellis_adam", moments, {}, dict.fromkeys(("gradient", "mean", "square"), FLAT)
    ),
    "weights": Case(
        "ellis_adam", weights, {},
        dict.fromkeys(("weight", "mean", "square"), FLAT) | {"etas": (2,)},
    ),
    "adamw": Case(
        "adamw", adamw, {}, dict.fromkeys(("weight", "gradient", "mean", "square"), FLAT)
    ),
    "gradients": Case("add_gradient", added, {"gradient": FLAT}, {"total": FLAT}),
    "squares": Case(
        "square_sums", lambda t: [square_sums(t["gradient"], spans(t["gradient"]))], {},
        {"gradient": FLAT},
    ),
}  # fmt: skip
INPUTS = [(case, name) for case in CASES for name in CASES[case].narrow | CASES[case].wide]


def nan_after(case: Case, poisoned: str, place: int, dtype: torch.dtype, device: str) -> Tensor:
    """Where all that a call gives is NaN, if one element of one of its inputs is."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for wanted, shapes in ((dtype, case.narrow), (statistics_dtype(dtype), case.wide)):
        for name, shape in shapes.items():
            value = 0.5 + torch.rand(shape, generator=generator)
            if name == poisoned:
                value.view(-1)[place] = torch.nan
            tensors[name] = value.to(wanted).to(device)
    found = [part for given in case.run(tensors) for part in _parts(given)]
    return torch.cat([part.detach().float().isnan().flatten().cpu() for part in found])


def _parts(given: Any) -> list[Tensor]:
    """Tensors in tuples. The interpreter makes numbers of NaN in float8, so of rows their scales.

    What the kernels would cast there, test_fused.py compares.
    """
    if isinstance(given, Tensor):
        return [] if is_interpreted() and given.dtype == torch.float8_e4m3fn else [given]
    return [part for each in given for part in _parts(each)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_narrow", [False, True], ids=["32 bits", "16 bits"])
@pytest.mark.parametrize(("name", "poisoned"), INPUTS)
def test_nan_reaches_what_depends_on_it(
    name: str, poisoned: str, is_narrow: bool, device: str
) -> None:
    is_gpu = device.startswith("cuda")
    half = torch.bfloat16 if is_gpu else torch.float16
    dtype = half if is_narrow else torch.float32
    assert is_fused(torch.zeros(1, dtype=dtype, device=device)) == (is_gpu or is_interpreted())
    for place in (0, -1):
        found = nan_after(CASES[name], poisoned, place, dtype, device)
        wanted = nan_after(CASES[name], poisoned, place, torch.float64, device)
        assert wanted.any()
        assert torch.equal(found, wanted), (place, found.nonzero(), wanted.nonzero())


@pytest.mark.parametrize("name", CASES)
def test_without_nan_there_is_none(name: str) -> None:
    assert not nan_after(CASES[name], "", 0, torch.float32, "cpu").any()


def test_every_op_has_a_case() -> None:
    assert {case.op for case in CASES.values()} == ops()
