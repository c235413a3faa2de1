"""Memory of this process and its loader workers on the host, and whether it only ever grows."""

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
# Buffers, caches and compiled code have come by then.
_SETTLED_STEPS = 10


def resident_bytes() -> int:
    """Resident memory of this process and of its children; what they share counts for each."""
    me = os.getpid()
    return sum(_resident(pid) for pid in (me, *_children(me)))


def _children(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in path.read_text().split()]
        except OSError:
            # the thread has just ended
            continue
    return found


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0


class HostMemory:
    """Warns when memory has grown by the limit since the tenth step, and at each doubling."""

    def __init__(self, rank: int, *, limit_bytes: int) -> None:
        self._rank, self._limit_bytes = rank, limit_bytes
        self._steps = 0
        self._settled_bytes = 0

    def measure(self) -> int:
        """Bytes after a step."""
        now = resident_bytes()
        self._steps += 1
        if self._steps <= _SETTLED_STEPS:
            self._settled_bytes = now
        elif now - self._settled_bytes > self._limit_bytes:
            log.warning(
                "rank %d and its loader have grown by %s bytes on the host in %d steps, to %s "
                "(guards.host_growth_bytes); data.loader_workers and checkpoint.asynchronous take "
                "memory, a leak takes more and more.",
                self._rank,
                f"{now - self._settled_bytes:,}",
                self._steps - _SETTLED_STEPS,
                f"{now:,}",
            )
            self._limit_bytes = 2 * (now - self._settled_bytes)
        return now
