"""Which implementation runs, and that it says so once."""

import logging
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
