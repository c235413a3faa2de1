"""A process that copies the record, and can fail in any way without training noticing.

Fed by a pipe that never blocks. Whatever happens there (a crash, a hang, a full disk, no network)
costs training at most one WARNING, and metrics.jsonl has everything anyway.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# Messages that wait while the process starts or is slow: minutes of the fastest runs, about 10 MB.
_MAX_WAITING = 10_000
_DRAINED = 100
# A process that has taken nothing for so long hangs. W&B's, starting offline after a failed start
# online, takes up to a minute and a half.
_STALL_S = 300.0
# What the process takes, beside its upload, to start and to end.
_GRACE_S = 5.0


class SinkProcess:
    """Runs `program`, which reads a JSON object a line and answers {"level", "message"} lines.

    The first object is `start`; the last one is {"finish": exit code}. No method raises or blocks,
    except that `close` and `drain` wait their time. Threads may share it.
    """

    def __init__(
        self,
        name: str,
        program: Path,
        start: Mapping[str, Any],
        *,
        log_path: Path,
        finish_s: float = 30.0,
    ) -> None:
        self.has_failed = False
        self._name, self._log_path, self._finish_s = name, log_path, finish_s
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: deque[bytes] = deque()
        self._replies = b""
        self._last_taken = time.monotonic()
        self._lock = threading.RLock()
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            self._enqueue(json.dumps(start).encode() + b"\n")
            self._process = _start_process(program, log_path)
        except (OSError, ValueError, TypeError) as error:
            self.disable(f"it could not be started ({error})")

    @property
    def is_active(self) -> bool:
        """Whether messages still go anywhere."""
        return self._process is not None

    @property
    def process_id(self) -> int:
        """The process, while active."""
        assert self._process is not None
        return self._process.pid

    def send(self, line: bytes) -> None:
        """Hands over one line, newline included; drops it if the process is disabled."""
        with self._lock:
            if self._process is None:
                return
            try:
                self._enqueue(line)
                self._pump()
            except Exception as error:
                # Whatever it is, monitoring must not stop training.
                self.disable(str(error) or type(error).__name__)

    def drain(self, stall_s: float) -> None:
        """Wait until most of what waits is taken: for whoever has time, unlike training."""
        deadline = time.monotonic() + stall_s
        while self._process is not None and len(self._waiting) > _DRAINED:
            try:
                self._pump()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it has not kept up for {stall_s:g} s")
            except Exception as error:
                self.disable(str(error) or type(error).__name__)
            time.sleep(0.001)

    def close(self, exit_code: int = 0) -> None:
        """Ends the process and waits for its upload, for `finish_s` seconds and a little more."""
        if self._process is None:
            return
        deadline = time.monotonic() + self._finish_s + _GRACE_S
        try:
            self._enqueue(json.dumps({"finish": exit_code}).encode() + b"\n")
            while self._process.poll() is None and time.monotonic() < deadline:
                self._pump()
                time.sleep(0.02)
            self._relay()
            if self._process.returncode is None:
                raise TimeoutError(f"it did not finish in {self._finish_s:g} s")
            if self._process.returncode != 0:
                raise ChildProcessError(f"its process ended with code {self._process.returncode}")
            self._close_pipes()
        except Exception as error:
            self.disable(str(error) or type(error).__name__)

    def disable(self, reason: str) -> None:
        """End the process now, and say why."""
        self.has_failed = True
        log.warning(
            "%s is disabled for this life: %s. Training goes on and metrics.jsonl has "
            "everything; details: %s",
            self._name,
            reason,
            self._log_path,
        )
        if self._process is not None:
            self._process.kill()
            self._close_pipes()
        self._waiting.clear()

    def _enqueue(self, line: bytes) -> None:
        if len(self._waiting) >= _MAX_WAITING:
            raise BufferError(f"{_MAX_WAITING} records wait, {self._name} takes none")
        self._waiting.append(line)

    def _pump(self) -> None:
        """Moves what the pipe takes at once."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._relay()
        if self._process.poll() not in (None, 0):
            raise ChildProcessError(f"its process ended with code {self._process.returncode}")
        pipe = self._process.stdin.fileno()
        try:
            while self._waiting:
                taken = os.write(pipe, self._waiting[0])
                self._last_taken = time.monotonic()
                self._waiting[0] = self._waiting[0][taken:]
                if not self._waiting[0]:
                    self._waiting.popleft()
        except BlockingIOError:
            silence_s = time.monotonic() - self._last_taken
            if silence_s > _STALL_S:
                raise TimeoutError(f"it has taken nothing for {silence_s:.0f} s") from None

    def _relay(self) -> None:
        """Logs what the process reports."""
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            while chunk := os.read(self._process.stdout.fileno(), 65536):
                self._replies += chunk
        except BlockingIOError:
            pass
        *lines, self._replies = self._replies.split(b"\n")
        for line in lines:
            report = json.loads(line)
            log.log(report["level"], report["message"])

    def _close_pipes(self) -> None:
        process, self._process = self._process, None
        assert process is not None
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def _start_process(program: Path, log_path: Path) -> subprocess.Popen[bytes]:
    # -P and a path: this package need not be importable there, and its modules shadow nothing.
    with log_path.open("ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            bufsize=0,
            # Ctrl-C at a terminal is for training, which then ends the run properly.
            start_new_session=True,
            env={"WANDB_ERROR_REPORTING": "false", **os.environ},
        )
    assert process.stdin is not None
    assert process.stdout is not None
    os.set_blocking(process.stdin.fileno(), False)
    os.set_blocking(process.stdout.fileno(), False)
    return process
