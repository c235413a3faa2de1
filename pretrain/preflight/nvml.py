"""What NVIDIA's driver says about the health of the GPUs, and what of it is bad. Torch-free."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import pynvml

from pretrain.loop.sensors import Reading
from pretrain.preflight.findings import Finding, Status

T = TypeVar("T")
GIB = 2**30
# A driver keeps some hundred MiB for itself; what is above belongs to a process.
FOREIGN_BYTES = 2 * GIB
# A limit lower than the board's own by more than this was set by somebody.
LOWERED_POWER = 0.95
NEARLY_TOO_HOT_C = 5

# Reasons for a lower clock that mean a fault of cooling or power; an idle GPU and one that draws
# all the power it may have are in order.
FAULTS = {
    pynvml.nvmlClocksEventReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "too hot (hardware)",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "too hot (driver)",
}
# The driver's own thermal control lowers the clock a little; the hardware's halves it or worse.
MILD = frozenset({"too hot (driver)"})


class NoDriverError(Exception):
    """There is no NVIDIA driver here, or it does not answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuState:
    """One GPU as its driver sees it; None: this model does not tell."""

    index: int
    name: str
    uuid: str
    uncorrected_now: int | None
    """Uncorrected memory errors since the driver was loaded."""
    uncorrected_ever: int | None
    """Uncorrected memory errors over the board's life."""
    has_pending_remap: bool
    """Bad memory rows wait for a reset to be replaced by spare ones."""
    has_failed_remap: bool
    """No spare rows are left."""
    faults: tuple[str, ...]
    """Why the clock is lower than it should be, at this moment."""
    temperature_c: int | None
    slowdown_c: int | None
    """The temperature from which the hardware slows down."""
    power_limit_w: float | None
    default_power_w: float | None
    used_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class DriverState:
    """The driver and its GPUs."""

    version: str
    gpus: list[GpuState]


def read_driver() -> DriverState:
    """The state of all GPUs that this process may see. Raises NoDriverError if none answers."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise NoDriverError(str(error)) from error
    try:
        gpus = [_read_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return DriverState(str(pynvml.nvmlSystemGetDriverVersion()), gpus)
    except pynvml.NVMLError as error:
        # a board that has fallen off the bus answers like this
        raise NoDriverError(f"the driver does not answer: {error}") from error
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def driver_version() -> str:
    """The NVIDIA driver's; empty where there is none, or it does not answer."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ""
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return ""
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def read_sensors(uuid: str) -> Reading | None:
    """What the GPU with this UUID feels now; None without an NVIDIA driver or such a GPU.

    Raises NoDriverError if a driver that is there does not answer.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        busy = _ask(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        power = _ask(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
        heat = _ask(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
        clock = _ask(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM))
        return Reading(
            utilization=None if busy is None else busy / 100,
            power_w=None if power is None else power / 1000,
            temperature_c=None if heat is None else float(heat),
            clock_hz=None if clock is None else clock * 1e6,
        )
    except pynvml.NVMLError_NotFound:
        return None
    except pynvml.NVMLError as error:
        raise NoDriverError(f"the driver does not answer: {error}") from error
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _read_gpu(index: int) -> GpuState:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    uncorrected = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    remapped = _ask(lambda: pynvml.nvmlDeviceGetRemappedRows(handle)) or (0, 0, 0, 0)
    reasons = _ask(lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
    limit = _ask(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle))
    default = _ask(lambda: pynvml.nvmlDeviceGetPowerManagementDefaultLimit(handle))
    return GpuState(
        index=index,
        name=str(pynvml.nvmlDeviceGetName(handle)),
        uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
        uncorrected_now=_ask(
            lambda: pynvml.nvmlDeviceGetTotalEccErrors(
                handle, uncorrected, pynvml.NVML_VOLATILE_ECC
            )
        ),
        uncorrected_ever=_ask(
            lambda: pynvml.nvmlDeviceGetTotalEccErrors(
                handle, uncorrected, pynvml.NVML_AGGREGATE_ECC
            )
        ),
        has_pending_remap=bool(remapped[2]),
        has_failed_remap=bool(remapped[3]),
        faults=tuple(name for bit, name in FAULTS.items() if reasons & bit),
        temperature_c=_ask(
            lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        ),
        slowdown_c=_ask(
            lambda: pynvml.nvmlDeviceGetTemperatureThreshold(
                handle, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
            )
        ),
        power_limit_w=None if limit is None else limit / 1000,
        default_power_w=None if default is None else default / 1000,
        used_bytes=int(memory.used),
        total_bytes=int(memory.total),
    )


def _ask(question: Callable[[], T]) -> T | None:
    """The answer, or None from a model that has none (a laptop's GPU has no ECC)."""
    try:
        return question()
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_NoPermission):
        return None


def judge_gpu(gpu: GpuState) -> Iterator[Finding]:
    """What is wrong with an idle GPU, each thing with its remedy; one ok if nothing is."""
    subject, found = f"gpu {gpu.index}", False
    for status, detail, remedy in [*_memory_faults(gpu), *_limits(gpu)]:
        yield Finding(status, subject, detail, remedy)
        found = True
    if not found:
        yield Finding(Status.ok, subject, f"{gpu.name}, healthy{_conditions(gpu)}")


def judge_load(gpu: GpuState) -> Iterator[Finding]:
    """What slows a GPU down that was read in the midst of work."""
    severe = [fault for fault in gpu.faults if fault not in MILD]
    if gpu.faults:
        status = Status.missing if severe else Status.warn
        detail = f"{gpu.name} slows down under load: {', '.join(gpu.faults)}{_conditions(gpu)}"
        yield Finding(status, f"gpu {gpu.index}", detail, "have its cooling and power looked at")


def _memory_faults(gpu: GpuState) -> Iterator[tuple[Status, str, str]]:
    if gpu.has_failed_remap:
        detail = "bad memory rows and no spare ones left"
        yield Status.missing, detail, "exclude the node; the board must be replaced"
    if gpu.has_pending_remap:
        detail = "bad memory rows wait to be replaced by spare ones"
        yield Status.missing, detail, "exclude the node; resetting the GPU replaces them"
    if gpu.uncorrected_now:
        detail = f"{gpu.uncorrected_now} uncorrected memory errors since the driver was loaded"
        yield Status.missing, detail, "exclude the node; reset the GPU, and test it"
    elif gpu.uncorrected_ever:
        detail = f"{gpu.uncorrected_ever} uncorrected memory errors in its life, none now"
        yield Status.warn, detail, "watch it: more of them mean a failing board"
    if gpu.used_bytes > FOREIGN_BYTES:
        detail = f"{gpu.used_bytes / GIB:.1f} of {gpu.total_bytes / GIB:.1f} GiB are in use already"
        yield Status.missing, detail, "end the process that holds them; nvidia-smi names it"


def _limits(gpu: GpuState) -> Iterator[tuple[Status, str, str]]:
    limit, default = gpu.power_limit_w, gpu.default_power_w
    if limit and default and limit < LOWERED_POWER * default:
        detail = f"its power is limited to {limit:.0f} W, the board's own limit is {default:.0f} W"
        yield (
            Status.warn,
            detail,
            f"nvidia-smi -i {gpu.index} -pl {default:.0f}, if that is allowed",
        )
    hot = gpu.temperature_c, gpu.slowdown_c
    if hot[0] is not None and hot[1] is not None and hot[0] > hot[1] - NEARLY_TOO_HOT_C:
        detail = f"{hot[0]} degrees before any work; it slows down at {hot[1]}"
        yield Status.warn, detail, "have its cooling looked at"


def _conditions(gpu: GpuState) -> str:
    shown = ""
    if gpu.temperature_c is not None:
        shown += f", {gpu.temperature_c} degrees"
    if gpu.power_limit_w is not None:
        shown += f", at most {gpu.power_limit_w:.0f} W"
    return shown
