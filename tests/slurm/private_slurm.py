"""A private SLURM: one controller and four node daemons on this host, in a folder of their own.

Daemons run in the foreground as children of pytest and end with it. It needs root, because
slurmd starts tasks in the name of users; nothing outside the folder is touched.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.testing import free_port

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("node1", "node2", "node3", "node4")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}({controller})
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
# Ranks meet at a port that follows from the job's id: two private SLURMs must not share ids.
FirstJobId={first_job}
AuthType=auth/munge
CryptoType=crypto/munge
# By default a job that queues again waits for 120 s, the life of its credential.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,requeue_delay=0
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
MessageTimeout=10
JobRequeue=1
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# The host may have fewer CPUs than its nodes declare.
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Slurm:
    """The running daemons and how to speak to them."""

    folder: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=lambda: dict.fromkeys(NODES, "127.0.0.1"))
    """Of every node."""
    controller: str = "127.0.0.1"
    """Address of the controller."""
    inside: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Words that put a command on a node with an address of its own."""

    @property
    def environment(self) -> dict[str, str]:
        """Where clients find the controller; nodes on loopback have no names that resolve."""
        clean = {key: value for key, value in os.environ.items() if "SLURM" not in key}
        added = {"SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        if not self.inside:
            added["MASTER_ADDR"] = "127.0.0.1"
        return clean | added

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Starts a daemon in the foreground, with its output in the folder."""
        with (self.folder / "daemons.log").open("ab") as log:
            daemon = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)
        self.daemons.append(daemon)
        return daemon

    def start_node(self, node: str) -> None:
        """Starts the daemon of a node."""
        self.nodes[node] = self.start(
            *self.inside.get(node, ()), program("slurmd"), "-D", "-N", node
        )

    def lose_node(self, node: str) -> None:
        """Kills the daemon of a node; what it has started goes on, and nobody can reach it."""
        daemon = self.nodes.pop(node)
        daemon.kill()
        daemon.wait()
        self.daemons.remove(daemon)

    def mark(self, node: str, state: str) -> None:
        """Sets a node's state as an administrator does."""
        self.command("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")

    def resume(self, node: str) -> None:
        """Gives a node back to jobs; one that was down may have come back by itself."""
        words = ["scontrol", "update", f"NodeName={node}", "State=RESUME"]
        subprocess.run(words, env=self.environment, capture_output=True)

    def idle_nodes(self) -> list[str]:
        """Nodes that jobs may use and none does."""
        words = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
        shown = subprocess.run(words, env=self.environment, capture_output=True, text=True)
        return shown.stdout.split()

    def pids(self, job_id: str, rank: int) -> list[int]:
        """Processes of a rank of a job's train step, its readers included."""
        wanted = {f"SLURM_JOB_ID={job_id}".encode(), f"SLURM_PROCID={rank}".encode()}
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                environment = set((entry / "environ").read_bytes().split(b"\0"))
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            is_step = not {b"SLURM_STEP_ID=4294967291"} & environment
            if wanted <= environment and is_step and words[1:4] == [b"-m", b"pretrain", b"train"]:
                found.append(int(entry.name))
        return sorted(found)

    def command(self, *words: str, cwd: Path = ROOT) -> str:
        """Output of one client command, which must succeed."""
        done = subprocess.run(words, cwd=cwd, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: str, cwd: Path = ROOT) -> str:
        """Queues a job; returns its id."""
        return self.command("sbatch", "--parsable", *words, cwd=cwd)

    def job(self, job_id: str) -> dict[str, str]:
        """What the controller knows about a job."""
        shown = self.command("scontrol", "show", "job", "--oneliner", job_id)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, job_id: str, *states: str, timeout_s: float = 120) -> dict[str, str]:
        """Waits until the job is in one of the states; returns what is known about it."""
        deadline = time.monotonic() + timeout_s
        while (job := self.job(job_id))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {job_id} is {job['JobState']}: {job}"
            time.sleep(0.1)
        return job

    def stop(self) -> None:
        """Ends jobs first, because their tasks are no children of ours; then the daemons."""
        subprocess.run(["scancel", "--user", str(os.getuid())], env=self.environment)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and self.command("squeue", "--noheader"):
            time.sleep(0.1)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def start_daemons(cluster: Slurm) -> None:
    folder = cluster.folder
    nodes = list(cluster.addresses)
    for name in ("state", *(f"spool-{node}" for node in nodes)):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    ports = free_ports(1 + len(nodes))
    content = CONFIGURATION.format(
        host=host,
        controller=cluster.controller,
        first_job=ports[0] * 101,
        user="root",
        folder=folder,
        ports=ports,
        nodes="\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr={address} Port={port} CPUs=8 "
            "RealMemory=4000"
            for (node, address), port in zip(cluster.addresses.items(), ports[1:], strict=True)
        ),
    )
    (folder / "slurm.conf").write_text(content)
    subprocess.run([program("mungekey"), "--create", f"--keyfile={folder}/munge.key"], check=True)
    cluster.start(
        program("munged"),
        "--foreground",
        "--force",
        f"--key-file={folder}/munge.key",
        f"--socket={folder}/munge.socket",
        f"--pid-file={folder}/munge.pid",
        f"--log-file={folder}/munge.log",
        f"--seed-file={folder}/munge.seed",
    )
    wait_until(lambda: (folder / "munge.socket").exists(), cluster)
    cluster.start(program("slurmctld"), "-D", "-c")
    for node in nodes:
        cluster.start_node(node)
    wait_until(lambda: cluster.idle_nodes() == nodes, cluster)


def wait_until(is_true, cluster: Slurm, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        logs = "".join(
            f"\n{path.name}:\n{path.read_text()[-2000:]}"
            for path in sorted(cluster.folder.glob("*.log"))
        )
        assert time.monotonic() < deadline, f"the private SLURM does not start:{logs}"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those where ranks meet.

    One that the kernel has chosen itself it may give to a connection before the daemon has it.
    """
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port(10_000, 2_000))
    return list(ports)


def find_program(name: str) -> str | None:
    """Daemons are often outside a user's PATH."""
    return shutil.which(name) or shutil.which(name, path="/usr/local/sbin:/usr/sbin:/sbin")


def program(name: str) -> str:
    path = find_program(name)
    assert path is not None
    return path
