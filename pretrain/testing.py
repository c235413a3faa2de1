"""What tests of several processes need: real ranks, and configurations small enough for them."""

import contextlib
import gc
import importlib.util
import inspect
import os
import pickle
import secrets
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from pretrain.config import TrainConfig
from pretrain.data.config import Corpus, DataConfig, TokenizerConfig
from pretrain.engine.config import CheckpointConfig, Device, EngineConfig, Precision
from pretrain.engine.world import FIRST_PORT, NUM_PORTS, exit_now, join
from pretrain.jobs.config import ClusterConfig
from pretrain.loop.config import (
    BatchConfig,
    LoggingConfig,
    RunConfig,
    ValidationConfig,
    WandbMode,
)
from pretrain.loop.guard_config import GuardConfig
from pretrain.model.config import DepthConfig, Law, ModelConfig
from pretrain.optim.config import EllisAdamConfig, ScheduleConfig
from pretrain.scaling.config import HardwareConfig

# torch imports its compiler when the first optimizer is made, DeepSpeed when it looks for Muon.
PRELOADED = (
    "pretrain.testing",
    "pretrain.engine.deepspeed",
    "torch._dynamo",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
POLL_S = 0.02
# After one rank has failed the others are given this long to fail of it themselves.
GRACE_S = 2.0


class RanksError(RuntimeError):
    """Some processes of `run_ranks` raised, died, or did not end in time."""


def run_ranks(
    function: Callable[..., Any], ranks: int, *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Run `function(world, *args)` in `ranks` real processes joined by gloo; results by rank.

    `function` must stand at the top of its file; arguments and results must be picklable. Raises
    RanksError with the traceback of every rank that failed. Only processes started here are
    ever killed. The first call of a session imports torch and DeepSpeed into a server (some ten
    seconds); each rank is a fork of it.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes: list[BaseProcess] = []
        try:
            _start(processes, function, ranks, args, Path(folder))
            _wait(processes, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        outcomes = [_outcome(Path(folder), rank, p) for rank, p in enumerate(processes)]
    failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(outcomes) if text]
    if failures:
        raise RanksError("\n".join(failures))
    return [result for _, result in outcomes]


def _start(
    processes: list[BaseProcess],
    function: Callable[..., Any],
    ranks: int,
    args: tuple[Any, ...],
    folder: Path,
) -> None:
    source = Path(inspect.getfile(function)).resolve()
    for place in _places(ranks):
        process = _fork_server().Process(
            target=_child, args=(source, function.__name__, args, place, folder)
        )
        process.start()
        processes.append(process)


def start_commands(
    ranks: int,
    arguments: list[str],
    *,
    cwd: Path,
    output: Path,
    before: Callable[[], None] | None = None,
) -> list[Any]:
    """Start `pretrain ARGUMENTS` as so many ranks, as a launcher would; their processes.

    Each is a fork of a server that has imported torch and DeepSpeed, so that it starts at once.
    What rank R says goes to the end of `output`, a folder, as R.txt. `before` is called in each
    process first. The caller ends them.
    """
    processes = []
    output.mkdir(parents=True, exist_ok=True)
    for rank, place in enumerate(_places(ranks)):
        process = _fork_server().Process(
            target=_command,
            args=(arguments, place if ranks > 1 else {}, cwd, output / f"{rank}.txt", before),
        )
        process.start()
        processes.append(process)
    return processes


def _command(
    arguments: list[str],
    place: dict[str, str],
    cwd: Path,
    output: Path,
    before: Callable[[], None] | None,
) -> None:
    """One rank of a command: the environment of a launcher, and files for what it says."""
    os.environ.update(place | {"OMP_NUM_THREADS": "1"})
    os.chdir(cwd)
    gc.freeze()
    said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(said, 1)
    os.dup2(said, 2)
    from pretrain import cli

    if before is not None:
        before()
    cli.main(arguments)


def _places(ranks: int) -> list[dict[str, str]]:
    """The variables of a launcher for each rank, on a port that is free."""
    port = free_port()
    return [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        for rank in range(ranks)
    ]


def free_port(first: int = FIRST_PORT, ports: int = NUM_PORTS) -> int:
    """A port that nobody listens on, and that no connection is given by the kernel meanwhile."""
    while True:
        port = first + secrets.randbelow(ports)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _fork_server() -> ForkServerContext:
    """A process that has imported what ranks need, on a CPU with one thread, and forks them."""
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    wanted = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _child(
    source: Path, name: str, args: tuple[Any, ...], place: dict[str, str], folder: Path
) -> None:
    """One rank: write ("", result) or (traceback, None), then end without interpreter shutdown."""
    os.environ.update(place)
    # DeepSpeed collects garbage over and over; what the server imported is none.
    gc.freeze()
    outcome: tuple[str, Any] = ("", None)
    try:
        function = getattr(load_module(source), name)
        world = join(tiny_engine())
        outcome = ("", function(world, *args))
        # Nobody's process group may vanish while another still waits in a collective.
        world.barrier()
    except BaseException:
        outcome = (traceback.format_exc(), None)
    partial = folder / f"{place['RANK']}.partial"
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(folder / place["RANK"])
    exit_now(1 if outcome[0] else 0)


def load_module(path: Path) -> ModuleType:
    """A module by its file: test files have no importable name, here or in another process."""
    spec = importlib.util.spec_from_file_location("by_path_" + path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _wait(processes: list[BaseProcess], timeout_s: float) -> None:
    """Wait until all have ended, one has failed and had its grace, or time is up."""
    deadline = time.monotonic() + timeout_s
    while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
        if any(p.exitcode not in (None, 0) for p in processes):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(POLL_S)


def _outcome(folder: Path, rank: int, process: BaseProcess) -> tuple[str, Any]:
    with contextlib.suppress(FileNotFoundError):
        outcome: tuple[str, Any] = pickle.loads((folder / str(rank)).read_bytes())
        return outcome
    code = process.exitcode
    return (f"ended by signal {-code}" if code and code < 0 else f"ended with code {code}", None)


def tiny_engine(**changes: Any) -> EngineConfig:
    """A CPU engine; collectives give up after a minute."""
    values: dict[str, Any] = {
        "zero_stage": 1,
        "precision": Precision.fp32,
        "device": Device.cpu,
        "bucket_elements": 5_000,
        "zero3_persistent_elements": 0,
        "timeout_s": 60,
    }
    return EngineConfig(**(values | changes))


def tiny_model(**changes: Any) -> ModelConfig:
    """A model of some 28,000 parameters."""
    values: dict[str, Any] = {
        "name": "tiny",
        "width": 24,
        "heads": 2,
        "inner": 32,
        "prelude_layers": 1,
        "core_layers": 2,
        "coda_layers": 1,
        "vocabulary_size": 323,
        "context": 8,
    }
    return ModelConfig(**(values | changes))


def tiny_config(**changes: Any) -> TrainConfig:
    """A whole configuration of a model of some 28,000 parameters; `changes` replace sections."""
    values: dict[str, Any] = {
        "run": RunConfig(name="tiny", dir="unused", seed=0, steps=4, tokens=None),
        "model": tiny_model(),
        "depth": DepthConfig(law=Law.poisson_lognormal, mean=4, backprop=3),
        "data": DataConfig(name="tiny", corpus=Corpus.embedded, shards="unused", context=8),
        "tokenizer": TokenizerConfig(path="unused", vocabulary_size=323),
        "batch": BatchConfig(global_tokens=16 * 8, micro_rows=2),
        "optimizer": EllisAdamConfig(name="ellis-adam", learning_rate=0.01, weight_decay=0.01),
        "schedule": ScheduleConfig(warmup_tokens=0, cooldown_tokens=0),
        "engine": tiny_engine(),
        "checkpoint": CheckpointConfig(every_steps=2),
        "validation": ValidationConfig(every_steps=2, rows=4, depths=[1, 4]),
        "guards": GuardConfig(),
        "logging": LoggingConfig(wandb=WandbMode.disabled),
        "cluster": ClusterConfig(
            nodes=1,
            gpus_per_node=1,
            gpu_memory_bytes=1 << 34,
            gpu_flops=1e12,
            utilization=0.5,
            hardware=_tiny_hardware(),
        ),
    }
    return TrainConfig(**(values | changes))


def _tiny_hardware() -> HardwareConfig:
    return HardwareConfig(
        forward_utilization=0.5,
        memory_bytes_per_s=1e10,
        link_bytes_per_s=1e9,
        link_latency_s=1e-4,
        network_bytes_per_s=1e8,
        network_latency_s=1e-3,
        collective_call_s=1e-3,
        gpu_spread=0.0,
        host_copy_bytes_per_s=1e10,
        pinned_bytes_per_s=1e10,
        storage_bytes_per_s=5e8,
        storage_total_bytes_per_s=5e8,
        failures_per_gpu_hour=0.0,
        hang_share=0.0,
        overlap_share=0.25,
        detect_s=1.0,
        requeue_s=0.0,
        start_s=10.0,
    )
