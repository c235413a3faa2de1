"""Run a program that nobody has read, in a process of its own that can do no harm.

What the process may do is told in `confined`. It may read files that its user may read, so its
output stays short and goes nowhere but to the record of the item.
"""

import contextlib
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from pretrain.errors import ConfigError
from pretrain.tasks import confined
from pretrain.tasks.config import CodeLimits

# An error's last line says what it was.
_KEPT_CHARACTERS = 300
_READ_BYTES = 1 << 16


class Verdict(NamedTuple):
    """What came of a program."""

    is_passed: bool
    why: str
    """Why it was not; "" if it was."""


def check_confinement(limits: CodeLimits) -> None:
    """Raises ConfigError if this machine cannot confine programs, or not even `pass` passes."""
    verdict = run_program("pass", limits)
    if not verdict.is_passed:
        raise ConfigError(
            f"evaluate.run_code=true, but even an empty program fails here: {verdict.why}. Raise "
            "the limits of evaluate.code, or leave tasks of kind code out."
        )


def run_program(program: str, limits: CodeLimits) -> Verdict:
    """Run it to its end or to one of the limits; all that it started is gone afterwards.

    Raises ConfigError if this machine cannot confine programs.
    """
    token = secrets.token_hex(16)
    request = {
        "program": program,
        "token": token,
        "cpu_s": limits.cpu_s,
        "memory_bytes": limits.memory_bytes,
    }
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        process = _start(folder)
        try:
            with contextlib.suppress(BrokenPipeError), process.stdin as stdin:  # type: ignore[union-attr]
                stdin.write(json.dumps(request).encode())
            said, cause = _read(process, limits)
        finally:
            _end(process)
    text = said.decode("utf-8", "replace")
    if cause is None and process.returncode == confined.EXIT_UNCONFINED:
        raise ConfigError(
            f"evaluate.run_code=true, but programs cannot be confined here: {text.strip()}. "
            "Leave tasks of kind code out."
        )
    if cause is None and process.returncode == 0 and text.endswith(token):
        return Verdict(True, "")
    return Verdict(False, cause or _reason(process.returncode, text, limits))


def _start(folder: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(Path(confined.__file__).resolve())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder,
        # no token, key or address of ours
        env={"PATH": os.defpath, "LANG": "C.UTF-8"},
        start_new_session=True,
    )


def _read(process: subprocess.Popen[bytes], limits: CodeLimits) -> tuple[bytes, str | None]:
    """What it prints until it closes its output, and which limit ended it, if one did."""
    assert process.stdout is not None
    deadline = time.monotonic() + limits.wall_s
    said = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left_s := deadline - time.monotonic()) > 0:
            if not selector.select(left_s):
                break
            part = os.read(process.stdout.fileno(), _READ_BYTES)
            if not part:
                return _wait(process, bytes(said), deadline, limits)
            said += part
            if len(said) > limits.output_bytes:
                return bytes(said), f"printed more than {limits.output_bytes} bytes"
    return bytes(said), _too_long(limits)


def _wait(
    process: subprocess.Popen[bytes], said: bytes, deadline: float, limits: CodeLimits
) -> tuple[bytes, str | None]:
    """A program may close its output and go on."""
    try:
        process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        return said, _too_long(limits)
    return said, None


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the whole group, while its leader is not reaped and the number cannot be another's."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _too_long(limits: CodeLimits) -> str:
    return f"ran longer than {limits.wall_s:g} s"


def _reason(code: int, text: str, limits: CodeLimits) -> str:
    if code == -signal.SIGXCPU:
        return f"used more than {limits.cpu_s} s of processor time"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][-_KEPT_CHARACTERS:] if lines else f"ended early with code {code}"
