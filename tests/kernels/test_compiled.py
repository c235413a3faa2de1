"""Every kernel compiled for Hopper at the production shapes: no spills, 16 bytes an access."""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

# huginn-3.5b at 4,096 tokens
N, D, INNER, HEADS, HEAD_WIDTH = 4096, 5280, 17_920, 55, 96
EPSILON = 1e-6


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


X, GAIN = meta(N, D), meta(D)
RSTD, DGAIN = meta(N, dtype=torch.float32), meta(D, dtype=torch.float32)
GATE_UP, HIDDEN = meta(N, 2 * INNER), meta(N, INNER)
COS = meta(N, HEAD_WIDTH // 2, dtype=torch.float32)
BIAS, DBIAS = meta(2, HEADS, HEAD_WIDTH), meta(2, HEADS, HEAD_WIDTH, dtype=torch.float32)
# attention's backward returns [B, H, T, K]
DQ = meta(1, HEADS, N, HEAD_WIDTH).transpose(1, 2)
STREAM = {"rstd_N": RSTD, "gain_D": GAIN}
BOTH = {"gain_a_D": GAIN, "gain_b_D": GAIN, "epsilon": EPSILON}
BOTH_BACK = {
    "rstd_a_N": RSTD, "gain_a_D": GAIN, "rstd_b_N": RSTD, "gain_b_D": GAIN,
    "dgain_a_D": DGAIN, "dgain_b_D": DGAIN,
}  # fmt: skip
ONE_BACK = {
    "rstd_a_N": RSTD, "gain_a_D": GAIN, "rstd_b_N": None, "gain_b_D": None, "dgain_a_D": DGAIN,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A call, and the most registers a thread may have for its programs to share an SM."""

    op: str
    call: Callable[[ModuleType], Any]
    registers: int
    scalar_accesses: int
    """Loads and stores of one number a row: 1 / RMS and scales."""
    launches: int = 1
    """Kernels, each of which must do."""


CASES = {
    "norm chain": Case(
        "norm_chain", lambda op: op.norm_chain(X, X, **STREAM, **BOTH), 64, 3
    ),
    "norm chain, fp8": Case(
        "norm_chain", lambda op: op.norm_chain(X, X, **STREAM, **BOTH, fp8=True), 64, 4
    ),
    "norm": Case(
        "norm_chain", lambda op: op.norm_chain(None, X, gain_a_D=GAIN, epsilon=EPSILON), 64, 1
    ),
    "norm chain output": Case(
        "norm_chain", lambda op: op.norm_chain_output(X, RSTD, GAIN, RSTD, GAIN), 64, 2
    ),
    "norm chain backward": Case(
        "norm_chain", lambda op: op.norm_chain_backward(X, X, X, **BOTH_BACK), 255, 6
    ),
    "norm backward": Case(
        "norm_chain", lambda op: op.norm_chain_backward(X, None, X, **ONE_BACK), 128, 3
    ),
    "swiglu": Case("swiglu", lambda op: op.swiglu(GATE_UP), 64, 0),
    "swiglu, fp8": Case("swiglu", lambda op: op.swiglu(GATE_UP, fp8=True), 64, 1),
    "swiglu backward": Case(
        "swiglu",
        lambda op: op.swiglu_backward(HIDDEN, GATE_UP, out=GATE_UP, hidden_out=HIDDEN), 64, 0,
    ),
    "rope": Case(
        "qk_rope", lambda op: op.qk_rope_(meta(N, 3, HEADS, HEAD_WIDTH), BIAS, COS, COS), 64, 0
    ),
    "rope backward": Case(
        "qk_rope", lambda op: op.qk_rope_backward(DQ, DQ, DQ, COS, COS, dbias_2HK=DBIAS), 64, 0
    ),
    "quantize rows": Case("quantize_rows", lambda op: op.quantize_rows(X), 64, 1),
    "quantize both ways": Case(
        "quantize_both_ways", lambda op: op.quantize_both_ways(meta(2 * INNER, D)), 96, 5, 4
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def launches() -> Iterator[ModuleType]:
    """The module beside this file, which needs triton."""
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)
    yield importlib.import_module("launches")
    sys.path.remove(folder)


@pytest.mark.parametrize("name", CASES)
def test_no_spills_and_wide_accesses(name: str, launches: ModuleType) -> None:
    case = CASES[name]
    module = importlib.import_module(f"pretrain_kernels.{case.op}.triton")
    column_sums_triton = importlib.import_module("pretrain_kernels.column_sums_triton")
    with launches.recorded(module) as recorded, launches.recorded(column_sums_triton) as sums:
        case.call(module)
    assert len(recorded) == case.launches
    for launch in recorded:
        check_machine(launches.compiled(launch), case)
    for launch in sums:
        machine = launches.compiled(launch)
        assert machine.spilled_accesses == 0, machine
        # all of the partial sums; what they are added to is a number a thread
        assert machine.loads - machine.vector_loads <= 1, machine


def check_machine(machine: Any, case: Case) -> None:
    assert machine.spilled_accesses == 0, machine
    assert machine.registers <= case.registers, machine
    assert machine.vector_loads > 0, machine
    # one kernel gives its results to atomic maxima
    assert machine.vector_stores > 0 or machine.stores == 0, machine
    narrow = machine.loads - machine.vector_loads + machine.stores - machine.vector_stores
    assert narrow <= case.scalar_accesses, machine


def test_spills_would_be_seen(launches: ModuleType) -> None:
    module = importlib.import_module("pretrain_kernels.norm_chain.triton")
    column_sums_triton = importlib.import_module("pretrain_kernels.column_sums_triton")
    with launches.recorded(module) as recorded, launches.recorded(column_sums_triton):
        module.norm_chain_backward(X, X, X, **BOTH_BACK)
    crowded = launches.Launch(recorded[0].kernel, recorded[0].values, {"num_warps": 4})
    assert launches.compiled(crowded).spilled_accesses > 0
