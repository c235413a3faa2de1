"""A copy of the record on W&B, which can fail in any way without training noticing.

W&B runs in a process of its own (`wandb_process`), fed by a pipe that never blocks. Whatever
happens there (a crash, a hang, a full disk, no network) costs training at most one WARNING, and
metrics.jsonl has everything anyway.
"""

import hashlib
import json
import logging
import netrc
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pretrain.loop.config import LoggingConfig, WandbMode
from pretrain.loop.metrics import encode_record

log = logging.getLogger(__name__)

# Records that wait while W&B starts or is slow: minutes of the fastest runs, about 10 MB.
_MAX_WAITING = 10_000
_DRAINED = 100
# A process that has taken nothing for so long hangs. Starting offline after a failed start online
# takes up to a minute and a half.
_STALL_S = 300.0
# What W&B takes, beside its upload, to start and to end.
_GRACE_S = 5.0


class WandbSink:
    """Sends records to W&B. No method raises or blocks, except that `close` waits its time.

    `run_config` becomes the page's configuration; the environment, the code and the console are
    never uploaded. Lives of one run folder share one W&B run.
    """

    def __init__(
        self,
        config: LoggingConfig,
        run_dir: Path,
        run_config: Mapping[str, Any],
        *,
        run_name: str,
        files_dir: Path | None = None,
        finish_s: float = 30.0,
    ) -> None:
        """`files_dir`: where W&B's files go; None: the run folder."""
        files_dir = files_dir or run_dir
        self.has_failed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: deque[bytes] = deque()
        self._replies = b""
        self._finish_s = finish_s
        self._last_taken = time.monotonic()
        self._log_path = files_dir / "wandb" / "sink.log"
        mode = choose_mode(config)
        if mode == "disabled":
            return
        try:
            for folder in (run_dir, files_dir):
                (folder / "wandb").mkdir(parents=True, exist_ok=True)
            run = {
                "project": config.project,
                "entity": config.entity,
                "tags": config.tags,
                "name": run_name,
                "id": stored_run_id(run_dir, run_name),
                "dir": str(files_dir),
            }
            start = {"mode": mode, "run": run, "config": run_config, "finish_timeout_s": finish_s}
            self._send(json.dumps(start).encode() + b"\n")
            self._process = _start_process(self._log_path)
        except (OSError, ValueError, TypeError) as error:
            self._disable(f"it could not be started ({error})")

    @property
    def is_active(self) -> bool:
        """Whether records still go to W&B."""
        return self._process is not None

    @property
    def process_id(self) -> int:
        """The process that speaks to W&B, while active."""
        assert self._process is not None
        return self._process.pid

    def write(self, record: Mapping[str, Any]) -> None:
        """Hands over one record; drops it if W&B is disabled."""
        if self._process is None:
            return
        try:
            self._send(encode_record(flatten(record)))
            self._pump()
        except Exception as error:
            # Whatever it is, monitoring must not stop training.
            self._disable(str(error) or type(error).__name__)

    def drain(self, stall_s: float) -> None:
        """Wait until W&B has taken most of what waits: for whoever has time, unlike training."""
        deadline = time.monotonic() + stall_s
        while self._process is not None and len(self._waiting) > _DRAINED:
            try:
                self._pump()
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it has not kept up for {stall_s:g} s")
            except Exception as error:
                self._disable(str(error) or type(error).__name__)
            time.sleep(0.001)

    def close(self, exit_code: int = 0) -> None:
        """Ends the W&B run and waits for its upload, for `finish_s` seconds and a little more."""
        if self._process is None:
            return
        deadline = time.monotonic() + self._finish_s + _GRACE_S
        try:
            self._send(json.dumps({"finish": exit_code}).encode() + b"\n")
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
            self._disable(str(error) or type(error).__name__)

    def _send(self, line: bytes) -> None:
        if len(self._waiting) >= _MAX_WAITING:
            raise BufferError(f"{_MAX_WAITING} records wait, W&B takes none")
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

    def _disable(self, reason: str) -> None:
        self.has_failed = True
        log.warning(
            "W&B is disabled for this life: %s. Training goes on and metrics.jsonl has "
            "everything; details: %s",
            reason,
            self._log_path,
        )
        if self._process is not None:
            self._process.kill()
            self._close_pipes()
        self._waiting.clear()

    def _close_pipes(self) -> None:
        process, self._process = self._process, None
        assert process is not None
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def choose_mode(config: LoggingConfig) -> str:
    """online, offline or disabled: what the configuration, W&B's own WANDB_MODE and keys allow."""
    if config.wandb is not WandbMode.auto:
        return str(config.wandb.value)
    wish = os.environ.get("WANDB_MODE", "online")
    return wish if wish != "online" or _has_key() else "offline"


def stored_run_id(run_dir: Path, run_name: str) -> str:
    """W&B's id of this run: derived once from name and place, then kept in the run folder."""
    path = run_dir / "wandb" / "run-id.txt"
    if not path.exists():
        digest = hashlib.sha256(f"{run_name}\0{run_dir.resolve()}".encode()).hexdigest()
        path.write_text(digest[:16] + "\n")
    return path.read_text().strip()


def flatten(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with one number per key, for charts: validation gets a key per depth."""
    flat = {key: value for key, value in record.items() if not isinstance(value, list | tuple)}
    for depth, nats in zip(
        record.get("validation/depths", ()), record.get("validation/loss_nats", ()), strict=True
    ):
        flat[f"validation/loss_nats_depth_{depth}"] = nats
    return flat


def _has_key() -> bool:
    """Whether W&B would find an API key without asking a person."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except FileNotFoundError:
        return False
    except (OSError, netrc.NetrcParseError) as error:
        log.warning("W&B stays offline: the netrc file cannot be read (%s).", error)
        return False


def _start_process(log_path: Path) -> subprocess.Popen[bytes]:
    # -P and a path: this package need not be importable there, and its modules shadow nothing.
    program = Path(__file__).with_name("wandb_process.py")
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
