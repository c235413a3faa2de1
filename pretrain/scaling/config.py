"""What a model of a run's wall time must know of the machines. Torch-free."""

import dataclasses
import math

from pretrain.errors import ConfigError

_RATES = (
    "memory_bytes_per_s",
    "link_bytes_per_s",
    "network_bytes_per_s",
    "host_copy_bytes_per_s",
    "pinned_bytes_per_s",
    "storage_bytes_per_s",
    "storage_total_bytes_per_s",
)
_NOT_NEGATIVE = (
    "link_latency_s",
    "network_latency_s",
    "collective_call_s",
    "gpu_spread",
    "failures_per_gpu_hour",
    "detect_s",
    "requeue_s",
    "start_s",
)


@dataclasses.dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """Rates, spread and failures of a cluster; docs/scaling.md gives the source of each value."""

    forward_utilization: float
    """Share of cluster.gpu_flops that iterations without gradient reach."""
    memory_bytes_per_s: float
    """Memory traffic of one GPU, which the optimizer's step is bound by."""
    link_bytes_per_s: float
    """What one GPU sends to others of its host in a collective, achieved."""
    link_latency_s: float
    """One hop of a collective inside a host."""
    network_bytes_per_s: float
    """What one GPU sends to other hosts while all others do too, achieved."""
    network_latency_s: float
    """One hop of a collective between hosts."""
    collective_call_s: float
    """Fixed cost of calling a collective."""
    overlap_share: float
    """Share of a reduction, and of a wait for it under ZeRO-2, that a backward pass hides."""
    gpu_spread: float
    """Standard deviation of the logarithm of a GPU's slowness: 0.01 is one per cent."""
    host_copy_bytes_per_s: float
    """From one GPU into pinned memory of its host, while a save makes training wait."""
    pinned_bytes_per_s: float
    """How fast one rank pins that memory, once in each life of a run."""
    storage_bytes_per_s: float
    """What one rank writes and hashes of a checkpoint."""
    storage_total_bytes_per_s: float
    """What the file system takes from all ranks together."""
    failures_per_gpu_hour: float
    """Failures that end the job, over GPUs and hours."""
    hang_share: float
    """Share of failures that nobody reports: guards.stall_s must pass first."""
    detect_s: float
    """From any other failure until the job has ended."""
    requeue_s: float
    """Until the job has hosts again, with a replacement for the broken one."""
    start_s: float
    """Until the next life takes its first step, reading the checkpoint included."""

    def __post_init__(self) -> None:
        for name in _RATES:
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"cluster.hardware.{name}={getattr(self, name)} must be above 0.")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(
                    f"cluster.hardware.{name}={getattr(self, name)} must be 0 or more."
                )
        if not 0 < self.forward_utilization <= 1:
            raise ConfigError(
                f"cluster.hardware.forward_utilization={self.forward_utilization} must be in "
                "(0, 1]."
            )
        for name in ("hang_share", "overlap_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"cluster.hardware.{name}={getattr(self, name)} must be in [0, 1]."
                )
