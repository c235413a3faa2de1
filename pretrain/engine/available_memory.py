"""How much host memory this process may still take: the host's, or less where a group is limited.

A SLURM job, a container and a service live in control groups. A process may be several folders
below the one that has the limit, in either version of the kernel's interface.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class _Files(NamedTuple):
    """What one version of the interface calls its files, and what of memory.stat makes way."""

    limit: str
    used: str
    reclaimable: str


_SECOND = _Files("memory.max", "memory.current", "inactive_file")
_FIRST = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_bytes(
    proc: Path = Path("/proc"), control_groups: Path = Path("/sys/fs/cgroup")
) -> int:
    """Memory that this process may take beside what it and its neighbours have."""
    found = [_numbers(proc / "meminfo")["MemAvailable:"] << 10]
    for folder, files in _groups(proc, control_groups):
        try:
            limit = int((folder / files.limit).read_text())
            used = int((folder / files.used).read_text())
            # files that were read and written count as used, and make way
            used -= _numbers(folder / "memory.stat")[files.reclaimable]
        except (OSError, ValueError, KeyError):
            # not mounted here, or max: no limit
            continue
        found.append(max(0, limit - used))
    return min(found)


def _groups(proc: Path, control_groups: Path) -> Iterator[tuple[Path, _Files]]:
    """This process's group and those that it lies in, as far as they can be seen."""
    for line in (proc / "self/cgroup").read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            root, files = control_groups, _SECOND
        elif "memory" in controllers.split(","):
            root, files = control_groups / "memory", _FIRST
        else:
            continue
        # a container may see the root of its own where the place is the host's
        own = root / place.lstrip("/")
        yield from (
            (folder, files) for folder in (own, *own.parents) if folder.is_relative_to(root)
        )


def _numbers(path: Path) -> dict[str, int]:
    """The first number behind each name."""
    words = (line.split() for line in path.read_text().splitlines())
    return {each[0]: int(each[1]) for each in words if len(each) > 1 and each[1].isdigit()}
