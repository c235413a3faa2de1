"""Programs that nobody has read are judged, and can do no harm."""

import os
import time
from pathlib import Path

import pytest

from pretrain.errors import ConfigError
from pretrain.tasks.config import CodeLimits
from pretrain.tasks.sandbox import check_confinement, run_program

LIMITS = CodeLimits(cpu_s=20, wall_s=120, memory_bytes=1 << 28, output_bytes=100_000)


def test_right_programs_pass_and_wrong_ones_say_why() -> None:
    imports = "import bisect, collections, datetime, hashlib, heapq, itertools, math, random, re"
    assert run_program(f"{imports}\nassert math.gcd(4, 6) == 2\nprint('x')", LIMITS) == (True, "")
    assert run_program("assert 1 == 2, 'no'", LIMITS) == (False, "AssertionError: no")
    assert "SyntaxError" in run_program("def f(:", LIMITS).why


@pytest.mark.parametrize(
    "early", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"]
)
def test_leaving_before_the_test_is_no_success(early: str) -> None:
    assert not run_program(f"{early}\nassert False", LIMITS).is_passed


@pytest.mark.parametrize(
    ("deed", "error"),
    [
        ("import os\nwhile True: os.fork()", "PermissionError"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError"),
        ("import os; os.execv('/bin/true', ['true'])", "PermissionError"),
        ("import threading; threading.Thread(target=print).start()", "can't start new thread"),
        ("import socket; socket.socket()", "PermissionError"),
        ("import os; os.kill(os.getppid(), 9)", "PermissionError"),
        ("import os; os.setsid()", "PermissionError"),
        ("import resource as r; r.setrlimit(r.RLIMIT_CPU, (99, 99))", "Error"),
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("f = lambda n: f(n + 1)\nf(0)", "RecursionError"),
    ],
)
def test_what_a_program_may_not_do(deed: str, error: str) -> None:
    verdict = run_program(deed, LIMITS)
    assert not verdict.is_passed
    assert error in verdict.why


@pytest.mark.parametrize(
    "deed",
    [
        "open({path!r}, 'w')", "open({path!r}, 'a')", "open({path!r}, 'r+')",
        "open({new!r}, 'x')", "open('here', 'w')", "import os; os.unlink({path!r})",
        "import os; os.rename({path!r}, {new!r})", "import os; os.mkdir({new!r})",
        "import os; os.truncate({path!r}, 0)", "import os; os.chmod({path!r}, 0)",
        "import os; os.symlink({path!r}, {new!r})", "import os; os.link({path!r}, {new!r})",
    ],
)  # fmt: skip
def test_no_file_is_written(tmp_path: Path, deed: str) -> None:
    path, new = tmp_path / "kept", tmp_path / "new"
    path.write_text("as it was")
    path.chmod(0o640)
    program = deed.format(path=str(path), new=str(new))
    assert "PermissionError" in run_program(program, LIMITS).why
    assert path.read_text() == "as it was"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_time_is_bounded_whether_it_computes_or_waits() -> None:
    limits = CodeLimits(cpu_s=1, wall_s=60, memory_bytes=1 << 28)
    assert "more than 1 s of processor time" in run_program("while True: pass", limits).why
    # one that closes its output and one that waits are ended by the clock
    limits = CodeLimits(cpu_s=30, wall_s=1.5, memory_bytes=1 << 28)
    started = time.monotonic()
    for program in ("import time; time.sleep(600)", "import os; os.close(1); os.close(2)\n"
                    "import time; time.sleep(600)"):  # fmt: skip
        assert run_program(program, limits).why == "ran longer than 1.5 s"
    assert time.monotonic() - started < 300


def test_a_flood_is_stopped() -> None:
    verdict = run_program("while True: print('x' * 1000)", LIMITS)
    assert verdict == (False, "printed more than 100000 bytes")


def test_nothing_of_ours_is_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    program = "import os\nassert sorted(os.environ) == ['LANG', 'PATH'], sorted(os.environ)"
    assert run_program(program, LIMITS) == (True, "")
    assert os.environ["WANDB_API_KEY"] == "secret"


def test_limits_that_nothing_meets_are_refused() -> None:
    check_confinement(LIMITS)
    limits = CodeLimits(cpu_s=20, wall_s=0.001, memory_bytes=1 << 28)
    with pytest.raises(ConfigError, match="even an empty program fails here: ran longer than 0"):
        check_confinement(limits)
