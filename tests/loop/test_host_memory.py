"""Memory on the host is measured, children included, and growth is said."""

import subprocess
import sys

MB = 1 << 20
# Both programs run in processes of their own: that of other tests gives memory back meanwhile.
ALLOCATING = """
import subprocess, sys

from pretrain.loop.host_memory import resident_bytes

code = "b = bytearray(200 << 20); print('ready', flush=True); input()"
before = resident_bytes()
block = bytearray(200 << 20)
print(resident_bytes() - before)
del block
before = resident_bytes()
with subprocess.Popen(
    [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
) as child:
    assert child.stdout.readline() == b"ready\\n"
    print(resident_bytes() - before)
    child.communicate(b"\\n")
"""


def test_what_is_allocated_is_measured_here_and_in_children() -> None:
    done = run(ALLOCATING)
    here, in_child = map(int, done.stdout.split())
    assert 190 * MB < here < 250 * MB
    # with the interpreter of the child
    assert 190 * MB < in_child < 300 * MB


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )


GROWING = """
from pretrain.loop.host_memory import HostMemory

memory = HostMemory(3, limit_bytes=50 << 20)
for _ in range(10):
    memory.measure()
kept = []
for megabytes in (30, 40, 40, 60, 60):
    kept.append(bytearray(megabytes << 20))
    print("grown by", sum(map(len, kept)) >> 20, file=sys.stderr)
    memory.measure()
"""


def test_growth_is_said_once_and_again_at_each_doubling() -> None:
    done = run(f"import logging, sys\nlogging.basicConfig(format='SAID %(message)s')\n{GROWING}")
    lines = done.stderr.splitlines()
    said = [number for number, line in enumerate(lines) if line.startswith("SAID")]
    # 70 is above 50, and 170 above twice 70: what Python takes meanwhile is less than 20
    assert [lines[number - 1] for number in said] == ["grown by 70", "grown by 170"]
    assert "rank 3 and its loader have grown by" in lines[said[0]]
    assert "guards.host_growth_bytes" in lines[said[0]]
