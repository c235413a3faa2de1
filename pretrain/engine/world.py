"""The processes of a run: who they are, what device each has, and how they agree.

Ranks come from torchrun's variables (or any launcher that sets them), from an srun step, or, if
there are neither, the process is alone.
"""

import datetime
import logging
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from pretrain.engine.config import Device, EngineConfig
from pretrain.errors import ConfigError

# What torchrun gives each process.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Slurm numbers its own steps (batch, interactive, extern, pending) from here.
FIRST_SPECIAL_STEP = 0xFFFF_FFF0
# Ports chosen from a job id: above the well-known ones, below Linux's ephemeral range.
FIRST_PORT, NUM_PORTS = 12_000, 20_000
# Every life of a job has its own port: a process that the life before left behind may still hold
# its. A prime, so that neighbouring jobs' lives do not meet either.
PORTS_BETWEEN_LIVES = 7_919


class Place(NamedTuple):
    """Where a process stands, and where all meet."""

    rank: int
    size: int
    local_rank: int
    meeting: str
    """torch's init_method: env:// for a launcher that set it up, tcp://host:port, or nothing."""
    host: str = "127.0.0.1"
    """Where rank 0 is."""


ALONE = Place(rank=0, size=1, local_rank=0, meeting="")


@dataclass(frozen=True, slots=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int
    """Number of this process, from 0."""
    size: int
    """Processes of the run."""
    local_rank: int
    """Number of this process on its host."""
    device: torch.device
    """What this process computes on."""
    host: str = "127.0.0.1"
    """Where rank 0 can be reached."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum([0.0])

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sums over ranks, in fp64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank."""
        return self.sum([float(flag)])[0] > 0

    def agree(self, value: Any) -> bool:
        """Whether every rank has an equal value."""
        values = self.gather_objects(value)
        return all(other == values[0] for other in values)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def join(config: EngineConfig, place: Place | None = None) -> World:
    """Find this process's rank and device, and meet the others; `place`, if any, says where it is.

    Sets LOCAL_RANK and DS_ACCELERATOR, which DeepSpeed reads. Raises ConfigError if the
    launcher's variables are incomplete or the device asked for does not exist.
    """
    place = place or find_place(os.environ)
    device = _choose_device(config.device, place.local_rank)
    os.environ["LOCAL_RANK"] = str(device.index or 0 if device.type == "cuda" else place.local_rank)
    os.environ["DS_ACCELERATOR"] = device.type
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if config.deterministic:
            _make_deterministic()
    timeout = datetime.timedelta(seconds=config.timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=place.meeting or None,
        store=None if place.meeting else _lone_store(),
        rank=place.rank,
        world_size=place.size,
        timeout=timeout,
    )
    return World(place.rank, place.size, place.local_rank, device, place.host)


def _lone_store() -> Any:
    """A rendezvous for a process that meets nobody: no port."""
    return dist.HashStore()  # type: ignore[attr-defined]


def leave(world: World) -> None:
    """Leave the other processes; no collective may follow."""
    logging.getLogger(__name__).debug("rank %d leaves", world.rank)
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_now(code: int) -> NoReturn:
    """End the process at once, with everything written.

    torch 2.13 with gloo aborts in interpreter shutdown now and then (15 of 100 runs measured), so
    processes that have met others end here rather than by returning.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def find_place(environ: Mapping[str, str]) -> Place:
    """This process's place, from a launcher's variables. Raises ConfigError if one is missing."""
    missing = [name for name in _TORCHRUN if name not in environ]
    if not missing:
        return _place_from_torchrun(environ)
    # first: pyxis gives a container with PyTorch RANK and LOCAL_RANK beside Slurm's variables
    if _is_in_srun_step(environ):
        return _place_from_slurm(environ)
    if "RANK" in environ or "WORLD_SIZE" in environ:
        raise ConfigError(
            f"The environment has {', '.join(name for name in _TORCHRUN if name in environ)} but "
            f"not {', '.join(missing)}; set all of {', '.join(_TORCHRUN)} (torchrun does), or none."
        )
    return ALONE


def _place_from_torchrun(environ: Mapping[str, str]) -> Place:
    rank, size, local_rank, _ = (
        _number(environ, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    )
    if not rank < size:
        raise ConfigError(f"RANK={rank} is not below WORLD_SIZE={size}.")
    return Place(rank, size, local_rank, "env://", environ["MASTER_ADDR"])


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ[name]
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"{name}={text!r} in the environment must be a number of 0 or more.")
    return int(text)


def _is_in_srun_step(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process; a batch script or interactive shell is not a rank."""
    step = environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < FIRST_SPECIAL_STEP


def _place_from_slurm(environ: Mapping[str, str]) -> Place:
    try:
        rank = int(environ["SLURM_PROCID"])
        size = int(environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"])
        local_rank = int(environ["SLURM_LOCALID"])
        job = int(environ["SLURM_JOB_ID"])
        restart = int(environ.get("SLURM_RESTART_COUNT") or 0)
        hosts = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
    except KeyError as error:
        raise ConfigError(
            f"This process is in Slurm step {environ['SLURM_STEP_ID']} but {error.args[0]} is not "
            "set; start it with srun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
            "MASTER_PORT."
        ) from None
    address = environ.get("MASTER_ADDR") or first_host(hosts)
    chosen = FIRST_PORT + (job + restart * PORTS_BETWEEN_LIVES) % NUM_PORTS
    port = _number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else chosen
    return Place(rank, size, local_rank, f"tcp://{address}:{port}" if size > 1 else "", address)


def first_host(hosts: str) -> str:
    """First host of a Slurm host list such as `node[01-04,07],login`.

    Read here, because containers have no scontrol.
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    assert first is not None
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _choose_device(wanted: Device, local_rank: int) -> torch.device:
    if wanted is Device.cpu or (wanted is Device.auto and not torch.cuda.is_available()):
        return torch.device("cpu")
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if visible == 0:
        raise ConfigError("engine.device=cuda, but torch sees no GPU; use engine.device=cpu.")
    # A launcher that binds one GPU to each task shows each task that GPU alone.
    index = 0 if visible == 1 else local_rank
    if index >= visible:
        raise ConfigError(
            f"Local rank {local_rank} has no GPU: {visible} are visible. Start at most {visible} "
            "processes on this host."
        )
    return torch.device("cuda", index)


def _make_deterministic() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # torch would also write NaN to all memory before it is used, a pass over every result of a
    # kernel; none is read before it is written (tests/kernels/conftest.py)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
