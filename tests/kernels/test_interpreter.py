"""The Triton kernels' arithmetic, on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "marker", "least"),
    [
        ("test_fused.py", "", 75),
        ("test_nan.py", "not gpu", 130),
        ("test_linear_cross_entropy.py", "gpu", 13),
        ("test_optimizer_kernels.py", "gpu", 28),
        ("test_hand_written_passes.py", "gpu", 2),
    ],
)
def test_kernels_are_right_in_the_interpreter(name: str, marker: str, least: int) -> None:
    # a process of its own: Triton reads the variable when a kernel is defined
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marker,
         str(Path(__file__).with_name(name))],
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ
        | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    # tests that skip themselves leave the code at 0
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= least, done.stdout[-2000:]
