"""`pretrain doctor` for one machine: can it train this configuration, and what is missing.

One line per finding: ok, warn (training works, but), missing (training cannot start) with what to
do about it. Nothing is written except a probe file where the run would write, and removed again.
"""

import math
import os
import platform
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pretrain.config import DoctorConfig, TrainConfig
from pretrain.data.store import check_tokenizer, open_manifest
from pretrain.data.tokenizer import Tokenizer
from pretrain.engine.config import Device, Precision
from pretrain.engine.memory import GIB, checkpoint_bytes, rank_memory
from pretrain.engine.trial import take_trial_step
from pretrain.engine.world import ALONE, join, leave
from pretrain.errors import ConfigError, PretrainError
from pretrain.jobs.progress import newest_state
from pretrain.loop.beginning import check_can_begin
from pretrain.loop.config import WandbMode
from pretrain.loop.state import total_rows
from pretrain.loop.wandb_sink import choose_mode
from pretrain.model.config import ComputePath
from pretrain.paths import config_source
from pretrain.preflight.findings import Finding, Status, refuse_missing, show

SLURM_COMMANDS = ("sbatch", "srun", "squeue", "scontrol")

Check = Callable[[TrainConfig], Iterator[Finding]]


def run(config: DoctorConfig) -> None:
    """Print what was found. Raises ConfigError or DataError if training could not start."""
    findings = show(finding for check in CHECKS for finding in check(config))
    refuse_missing(findings, "this machine", config.run.name)
    print(f"This machine can train {config.run.name}.")


def check_python(config: TrainConfig) -> Iterator[Finding]:
    """The interpreter against the version that the package asks for."""
    wanted = SpecifierSet(_project()[0])
    found = platform.python_version()
    if wanted.contains(found):
        yield Finding(Status.ok, "python", f"{found} (needs {wanted})")
    else:
        yield Finding(
            Status.missing, "python", f"{found}, but {wanted} is needed", "install a newer Python"
        )


def check_packages(config: TrainConfig) -> Iterator[Finding]:
    """Installed packages against the bounds that the package declares."""
    for requirement in _project()[1]:
        yield compare_package(requirement)


def compare_package(requirement: Requirement) -> Finding:
    """One installed package against its bounds."""
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        found = ""
    detail = f"{found or 'not installed'} (needs {requirement.specifier})"
    if found and requirement.specifier.contains(found, prereleases=True):
        return Finding(Status.ok, requirement.name, detail)
    remedy = f"pip install '{requirement.name}{requirement.specifier}'"
    return Finding(Status.missing, requirement.name, detail, remedy)


def check_machine(config: TrainConfig) -> Iterator[Finding]:
    """Processors and memory of the host, and its GPUs."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding(Status.ok, "host", f"{cores} cores, {memory / GIB:.1f} GiB of memory")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        if config.engine.device is Device.cuda:
            yield Finding(
                Status.missing,
                "gpu",
                f"engine.device=cuda, but torch {torch.__version__} sees none",
                "check the driver and CUDA_VISIBLE_DEVICES, or take engine.device=auto",
            )
        else:
            yield Finding(Status.ok, "gpu", "none; training runs on the CPU")
    for index in range(gpus):
        gpu = torch.cuda.get_device_properties(index)
        detail = f"{index}: {gpu.name}, {gpu.total_memory / GIB:.1f} GiB"
        if config.engine.precision is Precision.bf16 and gpu.major < 8:
            yield Finding(
                Status.warn, "gpu", f"{detail}, no bf16 units", "take engine.precision=fp32"
            )
        else:
            yield Finding(Status.ok, "gpu", detail)
    yield _check_memory(config, memory, gpus)


def check_communication(config: TrainConfig) -> Iterator[Finding]:
    """The libraries that processes talk through."""
    if dist.is_available() and dist.is_gloo_available():
        yield Finding(Status.ok, "gloo", "available")
    else:
        yield Finding(Status.missing, "gloo", "not in this torch", "install a torch wheel with it")
    if torch.cuda.is_available():
        if dist.is_nccl_available():
            nccl: Callable[[], tuple[int, ...]] = torch.cuda.nccl.version
            version = ".".join(str(part) for part in nccl())
            yield Finding(Status.ok, "nccl", version)
        else:
            yield Finding(Status.missing, "nccl", "not in this torch", "install a CUDA wheel")


def check_triton(config: TrainConfig) -> Iterator[Finding]:
    """The compiler of fused kernels; only GPUs need it. Without either, their references run."""
    try:
        found = metadata.version("triton")
    except metadata.PackageNotFoundError:
        found = ""
    has_gpu = torch.cuda.is_available() and config.engine.device is not Device.cpu
    instead = ""
    if config.model.path is ComputePath.fused and not (found and has_gpu):
        instead = "; model.path=fused runs the kernels' PyTorch references here"
    if found:
        use = "" if has_gpu else "; only GPUs use it"
        yield Finding(Status.ok, "triton", f"{found}{use}{instead}")
    elif has_gpu:
        yield Finding(
            Status.warn, "triton", f"not installed: no fused kernels{instead}", "pip install triton"
        )
    else:
        yield Finding(Status.ok, "triton", f"not installed; only GPUs use it{instead}")


def check_run_folder(config: TrainConfig) -> Iterator[Finding]:
    """Whether the run folder is a run's, can be written and holds the checkpoints that are kept."""
    folder = Path(config.run.dir).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    try:
        check_can_begin(config)
        # hidden, so that no other node takes it for somebody else's file meanwhile
        with tempfile.TemporaryFile(dir=existing, prefix=".probe-") as probe:
            probe.write(b"probe")
    except ConfigError as error:
        yield Finding(Status.missing, "run folder", str(error))
        return
    except OSError as error:
        yield Finding(
            Status.missing, "run folder", f"{existing}: {error}", "choose another run.dir"
        )
        return
    yield Finding(Status.ok, "run folder", f"{existing} can be written")
    free, one = shutil.disk_usage(existing).free, checkpoint_bytes(config.model)
    kept = config.checkpoint.keep_last + 1
    detail = f"{free / GIB:.2f} GiB free; {kept} checkpoints of {one / GIB:.2f} GiB"
    remedy = "free some, choose another run.dir, or lower checkpoint.keep_last"
    if free < one:
        yield Finding(Status.missing, "disk", detail, remedy)
    else:
        status = Status.ok if free >= kept * one else Status.warn
        yield Finding(status, "disk", detail, "" if status is Status.ok else remedy)


def check_tracking(config: TrainConfig) -> Iterator[Finding]:
    """Whether W&B would go online; training never depends on it."""
    mode = choose_mode(config.logging)
    detail = f"{mode} (logging.wandb={config.logging.wandb.value})"
    if mode == "offline" and config.logging.wandb is WandbMode.auto:
        detail += "; set WANDB_API_KEY to go online"
    yield Finding(Status.ok, "wandb", detail)


def check_data(config: TrainConfig) -> Iterator[Finding]:
    """Tokenizer and shards, and whether they belong together."""
    sha256 = None
    try:
        tokenizer = Tokenizer.load(config.tokenizer.path)
        sha256 = tokenizer.sha256
        detail = f"{tokenizer.vocabulary_size} pieces at {config.tokenizer.path}"
        yield Finding(Status.ok, "tokenizer", detail)
    except PretrainError as error:
        yield Finding(Status.missing, "tokenizer", str(error), error=type(error))
    try:
        manifest = open_manifest(config.data)
        check_tokenizer(
            manifest, vocabulary_size=config.model.vocabulary_size, tokenizer_sha256=sha256
        )
        state = newest_state(Path(config.run.dir), fingerprint=manifest.fingerprint)
    except PretrainError as error:
        yield Finding(Status.missing, "shards", str(error), error=type(error))
        return
    tokens = sum(source.totals("train").tokens for source in manifest.sources)
    passes = total_rows(config, state) * config.model.context / max(tokens, 1)
    yield Finding(
        Status.ok,
        "shards",
        f"{tokens:,} training tokens at {config.data.shards}; the run reads {passes:,.2f} times "
        "as many",
    )


def check_batch(config: TrainConfig) -> Iterator[Finding]:
    """Whether the batch divides over the processes that this host would start."""
    ranks = max(torch.cuda.device_count() if torch.cuda.is_available() else 1, 1)
    try:
        micro_steps = config.batch.micro_steps(context=config.model.context, ranks=ranks)
    except ConfigError as error:
        yield Finding(Status.warn, "batch", f"not on {ranks} ranks of this host: {error}")
        return
    detail = f"{ranks} ranks on this host: {micro_steps} micro-steps of {config.batch.micro_rows}"
    yield Finding(Status.ok, "batch", f"{detail} rows")


def check_step(config: TrainConfig) -> Iterator[Finding]:
    """One real optimizer step of a small model through the configured engine."""
    try:
        # whatever the launcher says: this is about one process
        world = join(config.engine, ALONE)
        loss, grad_norm = take_trial_step(config, world)
        leave(world)
    except Exception as error:
        yield Finding(
            Status.missing,
            "trial step",
            f"{type(error).__name__}: {error}",
            "a small model fails to train here; see `pretrain train debug=few-steps`",
        )
        return
    engine = config.engine
    detail = f"{world.device.type}, {engine.precision.value}, ZeRO-{engine.zero_stage}: "
    if math.isfinite(loss) and math.isfinite(grad_norm):
        yield Finding(
            Status.ok, "trial step", f"{detail}loss {loss:.3f}, gradient norm {grad_norm:.3f}"
        )
    else:
        yield Finding(
            Status.missing, "trial step", f"{detail}loss {loss}, gradient norm {grad_norm}"
        )


def check_slurm(config: TrainConfig) -> Iterator[Finding]:
    """Which of Slurm's commands are here; only submitting needs them."""
    found = [command for command in SLURM_COMMANDS if shutil.which(command)]
    yield Finding(Status.ok, "slurm", ", ".join(found) or "no commands; only submitting needs them")


CHECKS: tuple[Check, ...] = (
    check_python,
    check_packages,
    check_machine,
    check_communication,
    check_triton,
    check_run_folder,
    check_tracking,
    check_data,
    check_batch,
    check_slurm,
    check_step,
)


def _check_memory(config: TrainConfig, host_bytes: int, gpus: int) -> Finding:
    is_cpu = not gpus or config.engine.device is Device.cpu
    available = host_bytes if is_cpu else torch.cuda.get_device_properties(0).total_memory
    ranks = 1 if is_cpu else gpus
    needed = rank_memory(
        config.model,
        config.engine,
        backprop=config.depth.backprop,
        ranks=ranks,
        micro_rows=config.batch.micro_rows,
        micro_steps=math.ceil(config.rows_per_step / ranks / config.batch.micro_rows),
    ).total
    detail = (
        f"about {needed / GIB:.2f} GiB needed by each of {ranks} ranks, {available / GIB:.1f} there"
    )
    if needed <= available:
        return Finding(Status.ok, "memory", detail)
    return Finding(
        Status.warn,
        "memory",
        detail,
        "a smaller batch.micro_rows, engine.checkpoint_activations=true, a higher "
        "engine.zero_stage with more ranks, or a smaller model",
    )


def _project() -> tuple[str, list[Requirement]]:
    """The Python versions and packages that this package declares."""
    try:
        declared = metadata.metadata("pretrain")
        python = declared["Requires-Python"]
        lines = metadata.requires("pretrain") or []
    except metadata.PackageNotFoundError:
        project = tomllib.loads((Path(config_source()).parent / "pyproject.toml").read_text())
        python, lines = project["project"]["requires-python"], project["project"]["dependencies"]
    requirements = [Requirement(line) for line in lines]
    return python, [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
