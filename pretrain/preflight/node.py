"""`pretrain doctor doctor.scope=node`: is this node of a job healthy, and how fast is it.

One process per node, which meets no other: `srun --ntasks-per-node=1` starts one on each. What it
finds is printed, and written as NODE.json to doctor.folder, for the launcher to read and for
doctor.scope=compare.
"""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from pretrain.config import DoctorConfig
from pretrain.data.config import OnDamage
from pretrain.data.store import ShardStore, open_manifest
from pretrain.engine.config import Device
from pretrain.errors import DamageError, PretrainError
from pretrain.preflight import machine
from pretrain.preflight.burn import burn, copy_rates
from pretrain.preflight.findings import Finding, Status, refuse_missing, show
from pretrain.preflight.host import check_caches, check_limits, check_shared_memory, read_clock
from pretrain.preflight.nvml import GpuState, NoDriverError, judge_gpu, judge_load, read_driver
from pretrain.preflight.outliers import slow_ones
from pretrain.preflight.report import Measurements, NodeReport
from pretrain.preflight.versions import input_hashes, software_versions

Check = Callable[[DoctorConfig, Measurements], Iterator[Finding]]

# A GPU that is slower than this share of cluster.gpu_flops makes `pretrain plan` wrong.
PLANNED_SHARE = 0.8


def run(config: DoctorConfig) -> None:
    """Print and write what was found. Raises ConfigError or DataError if the node is not fit."""
    report = examine(config)
    if config.doctor.folder:
        path = report.write(Path(config.doctor.folder))
        print(f"written: {path}")
    refuse_missing(report.findings, f"node {report.node}", config.run.name)
    print(f"Node {report.node} can train {config.run.name}.")


def examine(config: DoctorConfig) -> NodeReport:
    """All checks of this node, printed as they come."""
    measured = Measurements()
    findings = show(finding for check in CHECKS for finding in _survive(check, config, measured))
    return NodeReport(node=node_name(), findings=findings, measurements=measured)


def node_name() -> str:
    """What Slurm calls this node, which may not be its host name; else that."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _survive(check: Check, config: DoctorConfig, measured: Measurements) -> Iterator[Finding]:
    """The check's findings; on a node that is broken anything may raise, and is a finding too."""
    try:
        yield from check(config, measured)
    except Exception as error:
        name = check.__name__.removeprefix("check_").replace("_", " ")
        yield Finding(
            Status.missing,
            name,
            f"could not be looked at: {type(error).__name__}: {error}",
            "exclude the node, and look at it",
        )


def check_gpus(config: DoctorConfig, measured: Measurements) -> Iterator[Finding]:
    """What the driver says of the GPUs, before this process uses them."""
    wants_gpus = config.engine.device is Device.cuda
    try:
        driver = read_driver()
    except NoDriverError as error:
        measured.versions["driver"] = ""
        status = Status.missing if wants_gpus else Status.ok
        remedy = "exclude the node, or install its driver" if wants_gpus else ""
        yield Finding(status, "driver", f"no NVIDIA driver ({error})", remedy)
        return
    measured.versions["driver"] = driver.version
    yield Finding(Status.ok, "driver", driver.version)
    yield from check_count(config, visible=torch.cuda.device_count(), present=len(driver.gpus))
    if config.engine.device is not Device.cpu:
        for gpu in _ours(driver.gpus):
            yield from judge_gpu(gpu)


def check_count(config: DoctorConfig, *, visible: int, present: int) -> Iterator[Finding]:
    """The GPUs that torch sees, and the driver has, against those that the run has a rank for."""
    expected = config.cluster.gpus_per_node
    detail = f"{visible} visible to torch, {present} to the driver, needed by this run: {expected}"
    is_enough = visible >= expected or config.engine.device is Device.cpu
    # engine.device=auto trains on the CPU where there is no GPU; where there is, it must not
    is_needed = config.engine.device is Device.cuda or max(visible, present) > 0
    if is_enough or not is_needed:
        yield Finding(Status.ok, "gpus", detail)
    else:
        remedy = (
            "exclude the node, or set CUDA_VISIBLE_DEVICES, cluster.gpus_per_node or engine.device"
        )
        yield Finding(Status.missing, "gpus", detail, remedy)


def check_speed(config: DoctorConfig, measured: Measurements) -> Iterator[Finding]:
    """Matrix products on all devices at once, and copies; wrong products and slow devices."""
    devices = _devices(config)
    loaded: list[GpuState] = []
    is_gpu = devices[0].type == "cuda"
    results = burn(
        devices,
        config.doctor.burn_s,
        midway=(lambda: loaded.extend(_ours(read_driver().gpus))) if is_gpu else None,
    )
    measured.devices = [
        torch.cuda.get_device_name(device) if is_gpu else "cpu" for device in devices
    ]
    measured.rates["gemm_tflops"] = [result.tflops for result in results]
    measured.rates |= copy_rates(devices)
    for device, result in zip(devices, results, strict=True):
        if not result.is_exact:
            yield Finding(
                Status.missing,
                str(device),
                "equal matrices gave another product than before: it computes wrong",
                "exclude the node; have the board or the memory tested",
            )
    for gpu in loaded:
        yield from judge_load(gpu)
    yield from judge_rates(measured.rates)
    if is_gpu:
        yield from _against_plan(config, min(measured.rates["gemm_tflops"]))


def judge_rates(rates: dict[str, list[float]]) -> Iterator[Finding]:
    """The speeds, and devices that are slower than their neighbours."""
    for name, values in rates.items():
        shown = ", ".join(f"{value:.4g}" for value in values)
        slow = slow_ones(values)
        for index in slow:
            detail = f"device {index} is slower than its neighbours: {shown}"
            yield Finding(Status.missing, name, detail, "exclude the node, and look at it")
        if not slow:
            yield Finding(Status.ok, name, shown)


def _against_plan(config: DoctorConfig, tflops: float) -> Iterator[Finding]:
    planned = config.cluster.gpu_flops / 1e12
    if tflops < PLANNED_SHARE * planned:
        yield Finding(
            Status.warn,
            "plan",
            f"{tflops:.0f} TFLOP/s, cluster.gpu_flops={config.cluster.gpu_flops:.3g} says "
            f"{planned:.0f}: the run will take longer than planned",
            "choose the cluster that this is, or set cluster.gpu_flops",
        )


def check_first_members(config: DoctorConfig, measured: Measurements) -> Iterator[Finding]:
    """The first member of a few shards, read and verified; every node takes other shards."""
    try:
        manifest = open_manifest(config.data)
    except PretrainError:
        # said by check_data
        return
    places = [
        (source, shard)
        for source, entry in enumerate(manifest.sources)
        for shard in range(len(entry.train))
    ]
    count = min(config.doctor.shards, len(places))
    first = int(os.environ.get("SLURM_NODEID") or 0) * count
    store = ShardStore(config.data, manifest, "train")
    sizes = []
    for index in range(first, first + count):
        source, shard = places[index % len(places)]
        reader = store.reader(source, shard)
        try:
            sizes.append(sum(len(member) for member in reader.verify_member(0)))
        except DamageError as error:
            is_fatal = config.data.on_damage is OnDamage.error
            status = Status.missing if is_fatal else Status.warn
            yield Finding(status, "shard", str(error), error=DamageError)
        finally:
            reader.close()
    if sizes:
        detail = f"{sum(sizes):,} bytes verified in the first members of {len(sizes)} shards"
        yield Finding(Status.ok, "shard", detail)


def check_versions(config: DoctorConfig, measured: Measurements) -> Iterator[Finding]:
    """Versions and hashes, which only a comparison with other nodes can judge."""
    measured.versions = software_versions(measured.versions.get("driver", ""))
    measured.hashes = input_hashes(config)
    for name, values in (("versions", measured.versions), ("hashes", measured.hashes)):
        shown = ", ".join(f"{key} {value[:12]}" for key, value in values.items())
        yield Finding(Status.ok, name, shown)


def check_clock(config: DoctorConfig, measured: Measurements) -> Iterator[Finding]:
    """This node's clock against that of the shared file system, if there is a folder on it."""
    if config.doctor.folder:
        folder = Path(config.doctor.folder)
        folder.mkdir(parents=True, exist_ok=True)
        clock = measured.clock = read_clock(folder)
        detail = f"{clock.offset_s:+.3f} s against {folder}, true to {clock.resolution_s:.3f} s"
        yield Finding(Status.ok, "clock", detail)


def _devices(config: DoctorConfig) -> list[torch.device]:
    """What the ranks of this node compute on; all cores of a CPU count as one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.engine.device is Device.cpu or not count:
        return [torch.device("cpu")]
    return [torch.device("cuda", index) for index in range(count)]


def _ours(gpus: list[GpuState]) -> list[GpuState]:
    """Those that this process computes on: the driver also shows what others have been given."""
    visible = {
        str(torch.cuda.get_device_properties(index).uuid)
        for index in range(torch.cuda.device_count())
    }
    return [gpu for gpu in gpus if gpu.uuid.removeprefix("GPU-") in visible]


def _only_looks(check: Callable[[DoctorConfig], Iterator[Finding]]) -> Check:
    """A check that measures nothing to compare, among those that do."""

    def checked(config: DoctorConfig, measured: Measurements) -> Iterator[Finding]:
        return check(config)

    checked.__name__ = check.__name__
    return checked


# The driver first: from then on this process itself holds memory on the GPUs. The trial step last.
CHECKS: tuple[Check, ...] = (
    check_gpus,
    _only_looks(machine.check_python),
    _only_looks(machine.check_packages),
    _only_looks(machine.check_machine),
    _only_looks(machine.check_communication),
    _only_looks(machine.check_triton),
    _only_looks(check_shared_memory),
    _only_looks(check_limits),
    _only_looks(check_caches),
    _only_looks(machine.check_run_folder),
    check_clock,
    _only_looks(machine.check_data),
    check_first_members,
    check_speed,
    check_versions,
    _only_looks(machine.check_step),
)
