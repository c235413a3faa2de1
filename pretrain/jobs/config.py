"""The machines a run is planned for and submitted to. Torch-free."""

import math
import re
from dataclasses import dataclass, field
from enum import Enum

from pretrain.errors import ConfigError
from pretrain.scaling.config import HardwareConfig

# What a line #SBATCH can hold without quotes.
_PLAIN = re.compile(r"[\w.,:/@+%=&|*()\[\]-]+")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_MINUTES = re.compile(r"\d+")
# YAML reads 1:00:00 as sixties of sixties: this number, and every longer time as a larger one.
_CLOCK_WITHOUT_QUOTES = 3600
_CLOCK = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>\d\d):(?P<seconds>\d\d)")


class ContainerKind(Enum):
    """What starts a container around each process."""

    none = "none"
    apptainer = "apptainer"
    pyxis = "pyxis"


@dataclass(kw_only=True, slots=True)
class ContainerConfig:
    """The container that every process of a job runs in."""

    kind: ContainerKind = ContainerKind.none
    """apptainer wraps each process; pyxis is srun's own --container-image."""
    image: str | None = None
    """A file or an address, as apptainer or enroot understands it."""
    mounts: list[str] = field(default_factory=list)
    """Folders to show inside, /source or /source:/target: runs and data must be among them."""

    def __post_init__(self) -> None:
        if (self.kind is ContainerKind.none) != (self.image is None):
            raise ConfigError(
                f"cluster.container.kind={self.kind.value} and image={self.image}: a container "
                "needs both, and without one both are left out (kind=none, image=null)."
            )
        if self.kind is ContainerKind.none and self.mounts:
            raise ConfigError(
                f"cluster.container.mounts={self.mounts} without a container; set kind and image."
            )
        for mount in self.mounts:
            if "," in mount or not mount.startswith("/"):
                raise ConfigError(
                    f"cluster.container.mounts has {mount!r}; give /source or /source:/target, one "
                    "list entry each."
                )


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """The machines a run is planned for, and what a job on them asks for."""

    nodes: int
    """Hosts."""
    gpus_per_node: int
    """GPUs of one host, one process each."""
    gpu_memory_bytes: int
    """Memory of one GPU."""
    gpu_flops: float
    """Sustained matrix throughput of one GPU in FLOP/s at the run's precision."""
    utilization: float
    """Share of gpu_flops that forward and backward passes with gradient reach."""
    hardware: HardwareConfig
    """Rates, spread and failures, for the expected wall time."""
    partition: str | None = None
    """Where a job runs; null: the cluster's default."""
    account: str | None = None
    """Who pays; null: the user's default."""
    qos: str | None = None
    """Quality of service; null: the default."""
    constraint: str | None = None
    """Features that nodes must have; null: any."""
    time: str = "24:00:00"
    """Longest life of a job: minutes, HH:MM:SS or D-HH:MM:SS."""
    grace_s: int = 300
    """How long before its end a job is told to save; covers one step and one save."""
    cpus_per_gpu: int | None = 8
    """Cores of one process; null: what the cluster gives."""
    exclusive: bool = False
    """Whether nodes are not shared, with all their memory."""
    options: list[str] = field(default_factory=list)
    """More options for sbatch; one that asks for GPUs, such as --gres=gpu:h200:8, replaces ours."""
    interface: str | None = None
    """Network interface between nodes, for NCCL and gloo; null: the first that is up."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that every process gets."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    """What every process runs in."""
    max_requeues: int = 100
    """How often a job may queue itself again."""
    max_resubmits: int = 3
    """How often a job may leave out a bad node and be submitted anew."""
    preflight: bool = True
    """Whether a job checks its nodes before it trains."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"cluster.{name}={getattr(self, name)} must be at least 1.")
        for name, least, unit in (
            ("gpu_memory_bytes", 1e6, "bytes: 80 GB are 80_000_000_000"),
            ("gpu_flops", 1e9, "FLOP per second: 312 TFLOP/s are 3.12e14"),
        ):
            if not least <= getattr(self, name) < math.inf:
                raise ConfigError(f"cluster.{name}={getattr(self, name)} is in {unit}.")
        if not 0 < self.utilization <= 1:
            raise ConfigError(f"cluster.utilization={self.utilization} must be in (0, 1].")
        for name, least in (
            ("grace_s", 1),
            ("cpus_per_gpu", 1),
            ("max_requeues", 0),
            ("max_resubmits", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"cluster.{name}={value} must be at least {least}.")
        if self.grace_s >= self.time_s:
            raise ConfigError(
                f"cluster.grace_s={self.grace_s} is not below cluster.time={self.time}, "
                f"{self.time_s} s; a job would be told to save before it has begun."
            )
        self._check_words()

    def _check_words(self) -> None:
        """Refuse what would break a line of the job's header or an export."""
        named = [
            (name, getattr(self, name)) for name in ("partition", "account", "qos", "constraint")
        ]
        named += [("interface", self.interface), *(("options", text) for text in self.options)]
        for name, text in named:
            if text is not None and not _PLAIN.fullmatch(text):
                raise ConfigError(
                    f"cluster.{name} has {text!r}; blanks, quotes and $ have no place there."
                )
        for text in self.options:
            if not text.startswith("--"):
                raise ConfigError(f"cluster.options has {text!r}; give --name or --name=value.")
        for name in self.environment:
            if not _VARIABLE.fullmatch(name):
                raise ConfigError(f"cluster.environment has {name!r}, no name of a variable.")

    @property
    def ranks(self) -> int:
        """Processes of the whole job."""
        return self.nodes * self.gpus_per_node

    @property
    def time_s(self) -> int:
        """Longest life of a job in seconds. Raises ConfigError if `time` cannot be read."""
        if _MINUTES.fullmatch(self.time):
            if int(self.time) >= _CLOCK_WITHOUT_QUOTES:
                raise ConfigError(
                    f"cluster.time={self.time} would be {int(self.time) / 60:g} hours. YAML makes "
                    "such a number of 12:00:00 without quotes; quote it, or write long times as "
                    "D-HH:MM:SS."
                )
            return 60 * int(self.time)
        clock = _CLOCK.fullmatch(self.time)
        if clock is None:
            raise ConfigError(
                f"cluster.time={self.time}; give minutes, HH:MM:SS or D-HH:MM:SS (in YAML, in "
                "quotes)."
            )
        days, hours, minutes, seconds = (int(text or 0) for text in clock.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


class Target(Enum):
    """Who starts the processes of a run."""

    slurm = "slurm"
    host = "host"
    hostfile = "hostfile"


@dataclass(kw_only=True, slots=True)
class SubmitOptions:
    """How a run is submitted."""

    to: Target
    """slurm: sbatch; host: processes on this machine; hostfile: ssh to each host of a file."""
    dry_run: bool
    """Print plan, script and command, and change nothing."""
    chain: int
    """Jobs in a row for one run, each after the end of the one before."""
    after: str | None
    """A job that must have ended before this one starts."""
    hostfile: str | None
    """Lines `HOST slots=N`, as DeepSpeed and MPI have them."""
    port: int
    """Where the processes of a hostfile meet on its first host."""
    sweep_dir: str | None
    """Folder for the list of a sweep's runs; null: out/sweeps/ and the time."""

    def __post_init__(self) -> None:
        if self.chain < 1:
            raise ConfigError(f"submit.chain={self.chain} must be at least 1.")
        if self.after is not None and not re.fullmatch(r"\d+(_\d+)?", self.after):
            raise ConfigError(f"submit.after={self.after} is no SLURM job id, such as 1234.")
        if not 1 <= self.port <= 65_535:
            raise ConfigError(f"submit.port={self.port} must be in 1..65535.")
        if self.to is not Target.slurm and (self.chain > 1 or self.after is not None):
            raise ConfigError(
                f"submit.to={self.to.value} has no queue; submit.chain and submit.after need slurm."
            )
        if (self.to is Target.hostfile) != (self.hostfile is not None):
            raise ConfigError(
                f"submit.to={self.to.value} and submit.hostfile={self.hostfile}: a hostfile is for "
                "submit.to=hostfile, which needs one."
            )


@dataclass(kw_only=True, slots=True)
class SweepOptions:
    """Which sweep a command is about."""

    dir: str
    """Folder with the sweep.json that `pretrain submit --multirun` has written."""
