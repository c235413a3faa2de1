"""A run on a list of hosts without a queue: one ssh to each, which starts that host's ranks.

The hosts share the file system that checkout and run folder are on. Whatever ends one host's part
badly, or a signal to this process, ends the others' parts by SIGTERM, so that they save.
"""

import logging
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from pretrain.config import TrainConfig
from pretrain.errors import EXIT_FINISHED, EXIT_SAVED_ON_SIGNAL, ConfigError

log = logging.getLogger(__name__)

_LINE = re.compile(r"(?P<host>[\w.@:-]+)(?:\s+slots=(?P<slots>\d+))?")
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20")
# torchrun gives its ranks 30 s to save before it kills them
_PATIENCE_S = 40.0
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """One line of a hostfile."""

    name: str
    slots: int
    """Ranks that it takes."""


def read_hostfile(path: Path) -> list[Host]:
    """Hosts of a file of lines `HOST slots=N`; # starts a comment. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"submit.hostfile={path} cannot be read: {error.strerror}.") from error
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not (line := line.split("#")[0].strip()):
            continue
        found = _LINE.fullmatch(line)
        # ssh would take a name that begins with a dash for an option
        if found is None or found["host"].startswith("-") or found["slots"] == "0":
            raise ConfigError(f"{path} line {number}: {line!r} is not HOST slots=N.")
        hosts.append(Host(name=found["host"], slots=int(found["slots"] or 1)))
    names = [host.name for host in hosts]
    if not hosts or len(set(names)) < len(names):
        raise ConfigError(f"{path} names {len(hosts)} hosts, {len(set(names))} of them different.")
    return hosts


def check_hosts(hosts: Sequence[Host], config: TrainConfig) -> None:
    """Raise ConfigError where hosts and cluster.nodes, cluster.gpus_per_node are not the same."""
    cluster = config.cluster
    slots = sorted({host.slots for host in hosts})
    if len(hosts) != cluster.nodes or slots != [cluster.gpus_per_node]:
        raise ConfigError(
            f"The hostfile has {len(hosts)} hosts with slots of {', '.join(map(str, slots))}; the "
            f"run is configured for cluster.nodes={cluster.nodes} with "
            f"cluster.gpus_per_node={cluster.gpus_per_node} each. Every host takes the same number."
        )


def ssh_command(host: Host, script: Path, number: int) -> list[str]:
    """The words that run a host's part of the script there."""
    # the remote shell reads one line
    return [*_SSH, host.name, shlex.join(["bash", str(script), str(number)])]


@dataclass(slots=True)
class Part:
    """One host's part of the run."""

    host: Host
    pid_file: Path
    process: subprocess.Popen[bytes]
    teller: subprocess.Popen[bytes] | None = field(default=None)
    """Who tells the host to stop its part."""

    def stop(self) -> None:
        """Send SIGTERM to the part's own process on its host, once that has said its number.

        Does not wait: the host may be what hangs.
        """
        pid = self.pid_file.read_text().strip() if self.pid_file.is_file() else ""
        # empty: between the shell's making the file and writing it, or so NFS shows it
        if self.teller is not None or self.process.poll() is not None or not pid:
            return
        self.teller = subprocess.Popen(
            [*_SSH, self.host.name, f"kill -TERM {pid}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def give_up(self) -> None:
        """End what is left of the part on this host."""
        for process in (self.process, self.teller):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()


def run_on_hosts(hosts: Sequence[Host], script: Path, folder: Path) -> int:
    """Start the run on all hosts and wait for its end; the code of the first that failed, or 75.

    Output of each host goes to hosts/NUMBER.log in the run's folder.
    """
    notes = folder / "hosts"
    parts: list[Part] = []
    is_asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal is_asked
        is_asked = True

    previous = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, host in enumerate(hosts):
            parts.append(_start(host, script, number, notes))
        code = _wait(parts, lambda: is_asked)
        # The record decides: torchrun ends with 1 whatever its ranks ended with.
        is_saved = is_asked and (folder / "requeue.json").is_file()
        return EXIT_SAVED_ON_SIGNAL if is_saved else code
    finally:
        for name, handler in previous.items():
            signal.signal(name, handler)
        for part in parts:
            part.give_up()


def _start(host: Host, script: Path, number: int, notes: Path) -> Part:
    pid_file = notes / f"{number}.pid"
    pid_file.unlink(missing_ok=True)
    try:
        with (notes / f"{number}.log").open("ab") as output:
            process = subprocess.Popen(
                ssh_command(host, script, number),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # Ctrl-C is for us, who tell the hosts
                start_new_session=True,
            )
    except FileNotFoundError:
        raise ConfigError("There is no ssh on this machine; submit.to=hostfile needs it.") from None
    return Part(host, pid_file, process)


def _wait(parts: Sequence[Part], is_asked: Callable[[], bool]) -> int:
    """Wait for every part; once one has failed, or somebody asks, stop them all."""
    first_code = EXIT_FINISHED
    deadline: float | None = None
    while any(part.process.poll() is None for part in parts):
        for part in parts:
            code = part.process.poll()
            if code and first_code == EXIT_FINISHED:
                first_code = code
                log.error(
                    "%s ended with code %d; the others are told to stop", part.host.name, code
                )
        if deadline is None and (first_code or is_asked()):
            deadline = time.monotonic() + _PATIENCE_S
        if deadline is not None:
            for part in parts:
                part.stop()
            if time.monotonic() > deadline:
                break
        time.sleep(_POLL_S)
    for part in parts:
        if part.process.poll() is None:
            pid = part.pid_file.read_text().strip() if part.pid_file.is_file() else "unknown"
            log.error("%s has not ended its part; look there for process %s", part.host.name, pid)
    return first_code or next((code for part in parts if (code := part.process.poll())), 0)
