"""How much of a run's time counts when jobs fail: saves, lost work, recoveries.

Failures come at a constant rate for each GPU. What was done since the last committed checkpoint
is then done again. The expectation is exact for exponential times between failures, recoveries
that fail too included, and for checkpoints that count only once they are written. With a save
that makes training wait until it is written this is Daly's formula, whose best interval for
rare failures is Young's sqrt(2 x stall x MTBF).

Sources: Young, CACM 17 (1974) 530; Daly, FGCS 22 (2006) 303. The delayed commit is ours.
"""

import math
from dataclasses import dataclass

import numpy as np

from pretrain.config import TrainConfig
from pretrain.engine.memory import checkpoint_bytes

# e^600 intervals in expectation: never ends, and is still a number.
_NEVER = 600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """Where wall time goes; the four add up to 1."""

    useful: float
    """Work that was not done again."""
    saving: float
    """Training waits for a save."""
    lost: float
    """Work that a failure took back."""
    recovering: float
    """From a failure to the next step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interruptions:
    """What interrupts a job, and what each costs."""

    mtbf_s: float
    """Mean time between failures of the whole job; inf: none."""
    recovery_s: float
    """Mean time from a failure to the first step after it."""
    copy_s: float
    """Training waits at every save for the copy."""
    write_s: float
    """From the copy until the checkpoint counts; training goes on if saves are asynchronous."""
    is_beside: bool
    """Whether checkpoints are written beside training."""

    @staticmethod
    def of(config: TrainConfig) -> "Interruptions":
        """Of a run as configured."""
        cluster, hardware = config.cluster, config.cluster.hardware
        rate = hardware.failures_per_gpu_hour * cluster.ranks / 3600
        size = checkpoint_bytes(config.model)
        share = size / cluster.ranks
        write_s = max(
            share / hardware.storage_bytes_per_s, size / hardware.storage_total_bytes_per_s
        )
        hangs = hardware.hang_share
        detected_s = hangs * config.guards.stall_s + (1 - hangs) * hardware.detect_s
        is_beside = config.checkpoint.asynchronous
        pinned_s = share / hardware.pinned_bytes_per_s if is_beside else 0.0
        return Interruptions(
            mtbf_s=1 / rate if rate else math.inf,
            recovery_s=detected_s + hardware.requeue_s + hardware.start_s + pinned_s,
            copy_s=share / hardware.host_copy_bytes_per_s if is_beside else 0.0,
            write_s=write_s,
            is_beside=is_beside,
        )

    @property
    def wait_s(self) -> float:
        """Training waits so long at a save, unless the one before is still being written."""
        return self.copy_s + (0.0 if self.is_beside else self.write_s)

    def shares(self, work_s: float) -> Shares:
        """Of wall time, where a save follows every `work_s` seconds of work."""
        if self.is_beside:
            # the next save first waits for the one before
            stall_s, delay_s = self.wait_s + max(self.write_s - work_s, 0.0), self.write_s
        else:
            stall_s, delay_s = self.wait_s, 0.0
        return _shares(work_s, stall_s, delay_s, mtbf_s=self.mtbf_s, recovery_s=self.recovery_s)

    def best_steps(self, step_s: float, *, limit: int, within: float = 1e-3) -> int:
        """Steps between saves: the most, up to `limit`, within a share of the best's useful time.

        Rarer saves are kinder to the file system, so of nearly equal ones the rarest is chosen.
        """
        tried = sorted({int(n) for n in np.geomspace(1, max(limit, 1), 200).round()})
        useful = [self.shares(n * step_s).useful for n in tried]
        enough = max(useful) - within
        return max(n for n, share in zip(tried, useful, strict=True) if share >= enough)


def _shares(
    work_s: float, stall_s: float, delay_s: float, *, mtbf_s: float, recovery_s: float
) -> Shares:
    """A committed checkpoint follows the last after `segment_s` if nothing fails meanwhile; after
    a failure it takes `delay_s` longer, because nothing newer is on its way."""
    segment_s = work_s + stall_s
    if math.isinf(mtbf_s):
        return Shares(
            useful=work_s / segment_s, saving=stall_s / segment_s, lost=0.0, recovering=0.0
        )
    # one recovery, begun anew whenever it fails
    recovered_s = mtbf_s * math.expm1(min(recovery_s / mtbf_s, _NEVER))
    grown = math.exp(min((segment_s + delay_s) / mtbf_s, _NEVER))
    again_s = (grown - 1) * (mtbf_s + recovered_s)
    risk = -math.expm1(-segment_s / mtbf_s)
    wall_s = risk * (mtbf_s + recovered_s + again_s)
    useful, saving = work_s / wall_s, stall_s / wall_s
    # failures while working: the first, and those of the attempts that follow it
    recovering = risk * grown * recovered_s / wall_s
    return Shares(
        useful=useful, saving=saving, lost=1 - useful - saving - recovering, recovering=recovering
    )
