"""A run's wall time: what a step takes and why, what failures add, what remains. Torch-free.

Depths are those that training deals, simulated for some steps; everything else is arithmetic.
"""

from dataclasses import astuple, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pretrain.config import TrainConfig
from pretrain.model.balance import Layout, Simulation, slowest_rank
from pretrain.scaling.communication import communication
from pretrain.scaling.compute import (
    RowSeconds,
    UpdateBytes,
    mean_row_iterations,
    optimizer_s,
    validation_s,
)
from pretrain.scaling.goodput import Interruptions, Shares

# Over so many drawn clusters the slowest GPU of 8 is known to 0.1 % at a spread of 1.5 %.
_CLUSTERS_DRAWN = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Mean seconds of a step by what they are spent on."""

    compute_s: float
    """A mean rank's forward and backward passes on a median GPU."""
    optimizer_s: float
    """The update, and the sums of gradients over micro-steps."""
    depth_wait_s: float
    """Waiting for the rank whose rows are deepest."""
    straggler_s: float
    """Further waiting, for the slowest GPUs."""
    communication_s: float
    """Standing still while bytes travel."""

    @property
    def total_s(self) -> float:
        """All of it."""
        return float(sum(astuple(self)))

    @property
    def idle(self) -> float:
        """Share of the step in which a mean rank computes nothing."""
        return 1 - (self.compute_s + self.optimizer_s) / self.total_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Expected wall time of a run."""

    step: StepTime
    """A step of training."""
    validation_s: float
    """Validations, spread evenly over steps."""
    interruptions: Interruptions
    """What ends lives, and what that costs."""
    shares: Shares
    """Of wall time, work being steps and validations."""
    best_every_steps: int
    """The most steps between saves that are within 0.1 % of the best."""
    best: Shares
    """Shares of wall time with those."""
    step_tokens: int
    """Tokens of a step."""
    total_steps: int
    """Steps of the run."""

    @property
    def tokens_per_s(self) -> float:
        """While steps are taken."""
        return self.step_tokens / self.step.total_s

    @property
    def goodput(self) -> float:
        """Share of wall time in steps that count."""
        return self.shares.useful * self.step.total_s / self._work_s

    @property
    def validating(self) -> float:
        """Share of wall time in validations that are not done again."""
        return self.shares.useful * self.validation_s / self._work_s

    @property
    def hours(self) -> float:
        """Wall time of the whole run."""
        return self.total_steps * self.step.total_s / self.goodput / 3600

    @property
    def wall(self) -> dict[str, float]:
        """Shares of wall time by cause; they add up to 1."""
        step, total_s = self.step, self.step.total_s
        return {
            "compute": self.goodput * step.compute_s / total_s,
            "optimizer": self.goodput * step.optimizer_s / total_s,
            "wait by depth": self.goodput * step.depth_wait_s / total_s,
            "stragglers": self.goodput * step.straggler_s / total_s,
            "communication": self.goodput * step.communication_s / total_s,
            "validation": self.validating,
            "saves": self.shares.saving,
            "lost work": self.shares.lost,
            "recovery": self.shares.recovering,
        }

    @property
    def _work_s(self) -> float:
        return self.step.total_s + self.validation_s


def estimate(config: TrainConfig, simulation: Simulation) -> Estimate:
    """Of a run whose rows have the depths of a simulation of its law."""
    step = step_time(config, simulation)
    validating_s = validation_s(config) / config.validation.every_steps
    work_s = step.total_s + validating_s
    interruptions = Interruptions.of(config)
    best = interruptions.best_steps(work_s, limit=config.total_steps)
    return Estimate(
        step=step,
        validation_s=validating_s,
        interruptions=interruptions,
        shares=interruptions.shares(config.checkpoint.every_steps * work_s),
        best_every_steps=best,
        best=interruptions.shares(best * work_s),
        step_tokens=config.batch.global_tokens,
        total_steps=config.total_steps,
    )


def layout_of(config: TrainConfig) -> Layout:
    """Where a run's ranks meet."""
    return Layout(
        ranks=config.cluster.ranks,
        micro_rows=config.batch.micro_rows,
        zero_stage=config.engine.zero_stage,
    )


def step_time(config: TrainConfig, simulation: Simulation) -> StepTime:
    """Mean seconds of a step, by cause.

    The mean work of a rank is exact, from the law; waiting in proportion to it is simulated.
    """
    depth, ranks, rows = simulation.depth, config.cluster.ranks, config.rows_per_step
    row = RowSeconds.of(config)
    compute_s = rows / ranks * row.at(*mean_row_iterations(config, depth))
    seconds = row.of_depths(simulation.totals, depth.backprop)
    mean = seconds.sum(axis=1).mean() / ranks
    deepest = slowest_s(config, seconds).mean()
    slowest = slowest_s(config, _on_unequal_gpus(config, seconds)).mean()
    micro_steps = rows // ranks // config.batch.micro_rows
    return StepTime(
        compute_s=compute_s,
        optimizer_s=optimizer_s(config),
        # nobody is faster than the mean but by rounding
        depth_wait_s=max(float(deepest / mean - 1), 0.0) * compute_s,
        straggler_s=float((slowest - deepest) / mean) * compute_s,
        communication_s=communication(config).of_step(micro_steps),
    )


def step_seconds(
    config: TrainConfig, totals: NDArray[np.int64], moved: UpdateBytes | None = None
) -> NDArray[np.float64]:
    """Seconds of steps whose rows have these depths, [steps] of [steps, rows]; equal GPUs.

    `moved`: by the update of a recorded run; None: by that of today.
    """
    seconds = RowSeconds.of(config).of_depths(totals, config.depth.backprop)
    micro_steps = totals.shape[1] // config.cluster.ranks // config.batch.micro_rows
    fixed = optimizer_s(config, moved) + communication(config).of_step(micro_steps)
    return slowest_s(config, seconds) + fixed


def slowest_s(config: TrainConfig, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Seconds of a step's passes until the last rank is through, [steps] of rows' [steps, rows].

    Where our own reduction overlaps under ZeRO-2 (bf16), a rank that is ahead goes on while its
    gradients wait for the others; overlap hides the same share of that wait as of the reduction.
    """
    layout, engine = layout_of(config), config.engine
    at_every_meeting = slowest_rank(seconds, layout)
    if not (engine.zero_stage == 2 and engine.overlap_comm and engine.reduces_itself):
        return at_every_meeting
    at_the_end = slowest_rank(seconds, replace(layout, zero_stage=1))
    hidden = config.cluster.hardware.overlap_share
    return hidden * at_the_end + (1 - hidden) * at_every_meeting


def _on_unequal_gpus(config: TrainConfig, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """The same steps on clusters drawn at random: [steps x drawn, rows]."""
    ranks, spread = config.cluster.ranks, config.cluster.hardware.gpu_spread
    if ranks == 1 or spread == 0:
        return seconds
    pairs = -(-_CLUSTERS_DRAWN // (2 * len(seconds)))
    drawn = (pairs, len(seconds), ranks, 1)
    logarithms = spread * _normals(config.run.seed, drawn)
    # each cluster beside its mirror image: their mean slowness is never below 1
    slowness = np.exp(np.concatenate([logarithms, -logarithms]))
    unequal: NDArray[np.float64] = seconds.reshape(len(seconds), ranks, -1) * slowness
    return unequal.reshape(-1, seconds.shape[1])


def _normals(seed: int, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Standard normal draws from raw words, which numpy keeps stable where its normals may change.

    Source: Box and Muller, Annals of Mathematical Statistics 29 (1958) 610.
    """
    half = -(-int(np.prod(shape)) // 2)
    words = np.random.Philox(key=seed).random_raw(2 * half).reshape(2, half)
    first, second = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log1p(-first)), 2 * np.pi * second
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return both[: int(np.prod(shape))].reshape(shape)
