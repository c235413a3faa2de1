"""What a node's operating system gives its ranks: memory, limits, caches, a clock. Torch-free."""

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pretrain.config import DoctorConfig
from pretrain.data.store import OPEN_SHARDS
from pretrain.engine.memory import GIB
from pretrain.preflight.findings import Finding, Status

MIB = 2**20
# NCCL without peer access talks through shared memory: 16 channels of two buffers of 4 MiB, each
# way; gloo and the loaders need less.
SHARED_BYTES_PER_RANK = 256 * MIB
# Sockets to other ranks, libraries, logs and devices, beside the shards.
OTHER_FILES = 512
INFINIBAND = Path("/sys/class/infiniband")
# The kernel stamps files with the time of its last tick, of 10 ms at most.
TICK_S = 0.01
CLOCK_PROBES = 5


@dataclass(frozen=True, slots=True)
class Clock:
    """This node's clock against the file system that all nodes share."""

    offset_s: float
    """How far it is ahead."""
    resolution_s: float
    """The offset is true to this."""


def check_shared_memory(config: DoctorConfig) -> Iterator[Finding]:
    """Room in /dev/shm for what the ranks of a node exchange."""
    free, ranks = shutil.disk_usage("/dev/shm").free, config.cluster.gpus_per_node
    needed = ranks * SHARED_BYTES_PER_RANK
    detail = f"{free / GIB:.2f} GiB free in /dev/shm; {ranks} ranks may take {needed / GIB:.2f}"
    if free >= needed:
        yield Finding(Status.ok, "shared memory", detail)
    else:
        remedy = "remove what dead processes left there, or start the container with more of it"
        yield Finding(Status.warn, "shared memory", detail, remedy)


def check_limits(config: DoctorConfig) -> Iterator[Finding]:
    """Limits on open files, and on memory that an InfiniBand card may read."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OPEN_SHARDS + OTHER_FILES
    detail = f"{soft} open files for each process; a rank may need {needed}"
    if soft == resource.RLIM_INFINITY or soft >= needed:
        yield Finding(Status.ok, "open files", detail)
    else:
        yield Finding(Status.missing, "open files", detail, f"ulimit -n {needed}, or more")
    if INFINIBAND.is_dir() and any(INFINIBAND.iterdir()):
        locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if locked == resource.RLIM_INFINITY:
            yield Finding(Status.ok, "locked memory", "unlimited")
        else:
            yield Finding(
                Status.warn,
                "locked memory",
                f"{locked / MIB:.0f} MiB, and InfiniBand registers all that it sends",
                "ulimit -l unlimited (limits.conf, and slurmd's own limit)",
            )


def check_caches(config: DoctorConfig) -> Iterator[Finding]:
    """Folders of compiled code: writable, and without locks that nobody holds any more.

    A process that waits for such a lock waits for good and says nothing.
    """
    for name, folder in compile_caches().items():
        if problem := _write_problem(folder):
            remedy = f"give permission there, or set {name} to a folder of this node"
            yield Finding(Status.missing, "compile cache", f"{folder}: {problem}", remedy)
    extensions = compile_caches()["TORCH_EXTENSIONS_DIR"]
    stale = stale_locks(extensions, older_than_s=config.doctor.stale_lock_s)
    for lock in stale:
        age = time.time() - lock.stat().st_mtime
        yield Finding(
            Status.warn,
            "compile lock",
            f"{lock} is {age / 60:.0f} minutes old: whatever builds that extension waits forever",
            f"rm {lock}, if no compiler is at work on it",
        )
    if not stale:
        yield Finding(Status.ok, "compile lock", f"none left behind in {extensions}")


def compile_caches() -> dict[str, Path]:
    """Where compiled code is kept, by the variable that moves it."""
    home = Path.home()
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    usual = {
        "TORCH_EXTENSIONS_DIR": user_cache / "torch_extensions",
        "TRITON_CACHE_DIR": home / ".triton" / "cache",
    }
    return {name: Path(os.environ.get(name) or folder) for name, folder in usual.items()}


def stale_locks(extensions: Path, *, older_than_s: float) -> list[Path]:
    """Locks of torch's extension builder, one per extension, that are older."""
    now = time.time()
    locks = [lock for lock in extensions.rglob("lock") if lock.is_file()]
    return sorted(lock for lock in locks if now - lock.stat().st_mtime > older_than_s)


def _write_problem(folder: Path) -> str:
    """Why nothing can be written there, now or once it is made; nothing if it can."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return ""
    except OSError as error:
        return str(error)


def read_clock(folder: Path) -> Clock:
    """This node's clock against that of the file system which holds `folder`, a shared one.

    NFS stamps a written file with its server's time, so the offsets of two nodes can be
    subtracted. File systems whose clients bring their own time (Lustre, a local disk) give 0 on
    every node: there only doctor.scope=job sees clocks apart. The probe that took least
    time counts, and bounds the error. Raises OSError if the folder cannot be written.
    """
    best = Clock(0.0, float("inf"))
    for _ in range(CLOCK_PROBES):
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock-") as probe:
            before = time.time()
            probe.write(b"probe")
            probe.flush()
            os.fsync(probe.fileno())
            after = time.time()
            stamp = os.stat(probe.name).st_mtime
        half = (after - before) / 2
        if half + TICK_S < best.resolution_s:
            best = Clock(before + half - stamp, half + TICK_S)
    return best
