"""Which implementation runs, and that it says so once."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain_kernels import dispatch
from pretrain_kernels.dispatch import choose, is_fused

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


class OnCuda:
    """As much of a CUDA tensor as the choice looks at."""

    is_cuda = True
    dtype = torch.bfloat16
    device = torch.device("cuda", 0)


@pytest.fixture
def cuda_tensor(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._announce.cache_clear()
    return OnCuda()


def test_the_cpu_runs_the_reference(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._announce.cache_clear()
    with caplog.at_level(logging.INFO):
        assert not choose("swiglu", torch.zeros(1))
        assert not choose("swiglu", torch.zeros(1))
        assert not choose("qk_rope", torch.zeros(1))
    assert [record.getMessage() for record in caplog.records] == [
        "swiglu on cpu runs as PyTorch",
        "qk_rope on cpu runs as PyTorch",
    ]


@pytest.mark.parametrize("installed", [True, False])
def test_cuda_runs_triton_where_it_is_installed(
    installed: bool,
    cuda_tensor: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: installed)
    with caplog.at_level(logging.INFO):
        assert choose("swiglu", cuda_tensor) is installed
        assert choose("swiglu", cuda_tensor) is installed
    (record,) = caplog.records
    assert "swiglu on cuda:0" in record.getMessage()
    assert record.levelno == (logging.INFO if installed else logging.WARNING)
    assert ("triton is not installed" in record.getMessage()) is not installed


def test_float64_and_mixed_devices_run_the_reference(
    cuda_tensor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    assert is_fused(cuda_tensor, cuda_tensor)
    assert not is_fused(cuda_tensor, torch.zeros(1))
    cuda_tensor.dtype = torch.float64
    assert not is_fused(cuda_tensor)


def test_a_kernel_that_is_switched_off_runs_as_its_reference_and_says_so(
    cuda_tensor: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setenv("PRETRAIN_KERNELS_OFF", "swiglu,norm_chain")
    with caplog.at_level(logging.WARNING):
        for op, is_kernel in (("swiglu", False), ("qk_rope", True), ("norm_chain", False)):
            assert choose(op, cuda_tensor) is is_kernel
            assert choose(op, cuda_tensor) is is_kernel
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"{op} on cuda:0 runs as PyTorch, because PRETRAIN_KERNELS_OFF names it"
        for op in ("swiglu", "norm_chain")
    ]
    monkeypatch.delenv("PRETRAIN_KERNELS_OFF")
    assert choose("swiglu", cuda_tensor)


def test_only_ops_can_be_switched_off(cuda_tensor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRAIN_KERNELS_OFF", "swiglu,norms")
    with pytest.raises(ValueError, match=r"names norms; the ops are adamw, .*, swiglu"):
        choose("swiglu", cuda_tensor)


def test_every_op_that_is_chosen_can_be_switched_off() -> None:
    sources = (KERNELS / "pretrain_kernels").rglob("*.py")
    found = {op for path in sources for op in re.findall(r'choose\("(\w+)"', path.read_text())}
    assert found == dispatch.ops()


@pytest.mark.skipif(not dispatch.has_triton(), reason="needs triton")
def test_a_pass_without_a_kernel_gives_what_it_gives_with_it() -> None:
    """In the interpreter: swiglu by its reference beside rotary positions by their kernel."""
    code = """
import torch
from pretrain_kernels import qk_rope, swiglu

torch.manual_seed(0)
x = torch.randn(5, 64)
qkv, bias, angles = torch.randn(5, 3, 2, 16), torch.randn(2, 2, 16), torch.randn(2, 5, 8)
print(swiglu._implementation(x).__name__, qk_rope._implementation(qkv).__name__)
print(swiglu.swiglu(x).double().sum().item(), qk_rope.qk_rope_(qkv, bias, *angles).sum().item())
"""
    said = []
    for off in ("", "swiglu"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env=os.environ | {"TRITON_INTERPRET": "1", "PRETRAIN_KERNELS_OFF": off}, cwd=KERNELS,
        )  # fmt: skip
        said.append(done.stdout.splitlines())
    assert said[0][0] == "pretrain_kernels.swiglu.triton pretrain_kernels.qk_rope.triton"
    assert said[1][0] == "pretrain_kernels.swiglu.reference pretrain_kernels.qk_rope.triton"
    numbers = [[float(word) for word in line.split()] for _, line in said]
    # one rounding of float32 in each of 160 elements
    assert numbers[0] == pytest.approx(numbers[1], abs=160 * 2**-23)


def test_the_package_imports_neither_triton_nor_the_model() -> None:
    modules = [
        ".".join(path.relative_to(KERNELS).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((KERNELS / "pretrain_kernels").rglob("*.py"))
        if not path.name.endswith("triton.py")
    ]
    assert len(modules) > 10
    code = (
        f"import sys, {', '.join(modules)}\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('triton', 'pretrain')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=KERNELS
    )
    assert done.stdout.strip() == "[]"
