"""Two hosts with addresses of their own on one machine: network namespaces on a bridge."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NETWORK = "10.231.77"
BRIDGE = f"{NETWORK}.254"
# `ip netns exec` would do, but hides /sys/fs/cgroup, which slurmd looks for.
ENTER = 'mount --bind "$0" /etc/hosts && exec "$@"'


@contextmanager
def two_hosts() -> Iterator[dict[str, Any]]:
    """Names, addresses and ways into two namespaces; skips where the kernel allows none.

    Names are in a file that a command there sees as /etc/hosts; this host's is untouched.
    """
    bridge, mark = f"br{os.getpid()}", f"p{os.getpid()}"
    spaces = [f"{mark}h{number}" for number in (1, 2)]
    folder = Path(tempfile.mkdtemp(prefix="hosts-"))
    hosts = f"127.0.0.1 localhost\n{BRIDGE} {socket.gethostname()}\n"
    hosts += "".join(f"{NETWORK}.{number} host{number}\n" for number in (1, 2))
    (folder / "hosts").write_text(hosts)
    try:
        try:
            _join(bridge, mark, spaces)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield {
            "controller": BRIDGE,
            "addresses": {f"host{number}": f"{NETWORK}.{number}" for number in (1, 2)},
            "inside": {
                f"host{number}": (
                    "nsenter", f"--net=/run/netns/{space}",
                    "unshare", "--mount", "sh", "-c", ENTER, str(folder / "hosts"),
                )
                for number, space in zip((1, 2), spaces, strict=True)
            },
        }  # fmt: skip
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True)
        shutil.rmtree(folder)


def _join(bridge: str, mark: str, spaces: list[str]) -> None:
    _ip("link", "add", bridge, "type", "bridge")
    _ip("address", "add", f"{BRIDGE}/24", "dev", bridge)
    _ip("link", "set", bridge, "up")
    for number, space in zip((1, 2), spaces, strict=True):
        _ip("netns", "add", space)
        link = f"{mark}v{number}"
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", link, "master", bridge, "up")
        _ip("-netns", space, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _ip("-netns", space, "link", "set", device, "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
