"""The lease on a run folder: at most one life of a run writes into it.

lock.json names the holder; its modification time is the holder's heartbeat, refreshed at every
step. A holder that is certainly or very likely dead is replaced. A holder that was replaced and
still lives (an orphan on a node that lost contact) finds out at its next refresh and stops.
"""

import dataclasses
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from pretrain.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

# Longer than any step, validation or save, so that only the dead are silent for it.
_STALE_S = 30 * 60.0
# After replacing a holder, time for a competitor that replaced it at the same moment.
_SETTLE_S = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """The process that holds a run folder."""

    token: str
    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    pid_start: str
    job_id: str
    restart_count: int
    since: str
    cluster: str = ""
    """Whose job it is: ids are SLURM's own on each cluster."""

    @classmethod
    def current(cls) -> "Holder":
        """This process."""
        pid = os.getpid()
        return cls(
            token=secrets.token_hex(8),
            host=socket.gethostname(),
            boot_id=_read_text("/proc/sys/kernel/random/boot_id"),
            pid_namespace=_pid_namespace(),
            pid=pid,
            pid_start=_start_of(pid) or "",
            job_id=os.environ.get("SLURM_JOB_ID", ""),
            restart_count=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            cluster=os.environ.get("SLURM_CLUSTER_NAME", ""),
        )

    def __str__(self) -> str:
        job = f", SLURM job {self.job_id} restart {self.restart_count}" if self.job_id else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


class RunLock:
    """Holds a run folder while entered; rank 0 alone uses it.

    `refresh` at every step. Raises ConfigError on entry if a live process holds the folder.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        stale_s: float = _STALE_S,
        has_ended: Callable[[str], bool] = lambda job_id: False,
    ) -> None:
        """`has_ended`: whether a job of this user and cluster is over, by its id."""
        self._has_ended = has_ended
        self._path = run_dir / "lock.json"
        # stays when the lock goes: an orphan that wakes up after its successor has ended sees it
        self._last_path = run_dir / "lock.last"
        self._stale_s = stale_s
        self._holder = Holder.current()

    def __enter__(self) -> "RunLock":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._create():
            self._sign()
            return self
        other = _read_holder(self._path)
        if other is not None:
            reason = self._reason_to_replace(other)
            if reason is None:
                raise self._refusal(other)
            log.warning("%s was held by %s; taken over: %s.", self._path, other, reason)
        else:
            log.warning("%s names no holder (damaged or just gone); taken over.", self._path)
        os.replace(self._write_draft(), self._path)
        time.sleep(_SETTLE_S)
        other = _read_holder(self._path)
        if other != self._holder:
            raise self._refusal(other)
        self._sign()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if _read_holder(self._path) == self._holder:
            self._path.unlink(missing_ok=True)

    def refresh(self) -> None:
        """The heartbeat.

        Raises CheckpointError if another life has taken the folder: this process writes no more.
        """
        try:
            other = _read_holder(self._path)
            if other == self._holder:
                os.utime(self._path)
                return
            is_last = _read_text(str(self._last_path)) == self._holder.token
            if other is None and is_last and not self._path.exists() and self._create():
                log.warning("%s was removed by hand; made again.", self._path)
                return
        except OSError as problem:
            log.warning("The heartbeat of %s failed: %s", self._path, problem)
            return
        raise CheckpointError(
            f"{self._path.parent} now belongs to {other or 'a later life'}; "
            f"this life ({self._holder}) stops without writing."
        )

    def _sign(self) -> None:
        """Leave this life's token as that of the last to hold the folder."""
        draft = self._path.with_name(f"lock.{self._holder.token}.partial")
        draft.write_text(self._holder.token + "\n")
        draft.replace(self._last_path)

    def _create(self) -> bool:
        """Publishes the lock if there is none; linking is atomic on network file systems too."""
        draft = self._write_draft()
        try:
            os.link(draft, self._path)
        except FileExistsError:
            # NFS may have linked it, lost its answer and asked again
            return _read_holder(self._path) == self._holder
        finally:
            draft.unlink()
        return True

    def _write_draft(self) -> Path:
        draft = self._path.with_name(f"lock.{self._holder.token}.partial")
        draft.write_text(json.dumps(dataclasses.asdict(self._holder), indent=1) + "\n")
        return draft

    def _reason_to_replace(self, other: Holder) -> str | None:
        """Why `other` counts as dead, or None if it may be alive."""
        mine = self._holder
        is_same_system = (mine.host, mine.boot_id, mine.pid_namespace) == (
            other.host,
            other.boot_id,
            other.pid_namespace,
        )
        if is_same_system and _start_of(other.pid) != other.pid_start:
            return "that process has ended"
        is_same_job = mine.job_id != "" and mine.job_id == other.job_id
        if is_same_job and mine.restart_count > other.restart_count:
            return f"this is restart {mine.restart_count} of the same job"
        # killed at its time limit, say, on another host than ours
        if self._is_of_our_queue(other) and self._has_ended(other.job_id):
            return f"SLURM job {other.job_id} has ended"
        # the queue may take seconds to answer
        if not self._path.exists():
            return "it has just left"
        silence_s = self._silence_s()
        if silence_s > self._stale_s:
            return f"it has been silent for {silence_s:.0f} s, more than {self._stale_s:.0f} s"
        return None

    def _is_of_our_queue(self, other: Holder) -> bool:
        """Whether the queue would show `other`'s job to this user, were it there."""
        is_same_cluster = other.cluster == self._holder.cluster != ""
        is_same_user = self._path.stat().st_uid == os.getuid()
        return is_same_cluster and is_same_user and other.job_id != ""

    def _silence_s(self) -> float:
        """Age of the heartbeat by the file system's own clock, which all hosts share."""
        draft = self._write_draft()
        try:
            return draft.stat().st_mtime - self._path.stat().st_mtime
        finally:
            draft.unlink()

    def _refusal(self, other: Holder | None) -> ConfigError:
        return ConfigError(
            f"run.dir={self._path.parent} is in use by {other or 'another process'} (last "
            f"heartbeat {self._silence_s():.0f} s ago).\n  Stop that process or choose another "
            f"run.dir. If it is dead, remove {self._path}, or wait: a holder that is silent for "
            f"{self._stale_s / 60:g} minutes is replaced."
        )


def _read_holder(path: Path) -> Holder | None:
    """The holder named in the file, or None if it is missing or damaged."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _start_of(pid: int) -> str | None:
    """When a process started, in the kernel's ticks, or None if it has ended.

    Tells a process from a later one with the same number. A zombie has ended. Empty where there
    is no /proc.
    """
    if not os.path.exists("/proc/self/stat"):
        return "" if _is_signalable(pid) else None
    # Fields after the command, which may hold spaces: state is the first, start the twentieth.
    fields = _read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if fields and fields[0] not in "ZX" else None


def _is_signalable(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _pid_namespace() -> str:
    """Containers on one host number their processes separately."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
