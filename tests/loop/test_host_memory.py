"""Memory on the host is measured, children included, and growth is said."""

import subprocess
import sys

import pytest

from pretrain.loop.host_memory import HostMemory, resident_bytes

MB = 1 << 20


def test_what_is_allocated_is_measured_here_and_in_children() -> None:
    before = resident_bytes()
    block = bytearray(200 * MB)
    assert 190 * MB < resident_bytes() - before < 250 * MB
    del block
    before = resident_bytes()
    code = f"b = bytearray({200 * MB}); print('ready', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        assert resident_bytes() - before > 190 * MB
        child.communicate(b"\n")


def test_growth_is_said_once_and_again_at_each_doubling(
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory = HostMemory(3, limit_bytes=50 * MB)
    for _ in range(10):
        memory.measure()
    kept, counts = [], []
    for _ in range(6):
        kept.append(bytearray(40 * MB))
        memory.measure()
        counts.append(len(caplog.records))
    # grown by 40, 80, 120, 160, 200, 240 MB; said above 50, then above twice 80
    assert counts[:3] == [0, 1, 1]
    assert counts[-1] == 2
    assert "rank 3 and its loader have grown by" in caplog.text
    assert "guards.host_growth_bytes" in caplog.text
