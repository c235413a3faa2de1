"""What unequal depths cost: how long ranks wait for the slowest, by simulating the deal.

Work is counted in forward passes of the core, n + 4 k for a row of depth n + k; a micro-batch
costs the sum over its rows, because no row is computed beyond its own depth.
"""

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from pretrain.model.config import DepthConfig, Sampling, Scope
from pretrain.model.depth import core_work, settled, step_totals


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How the rows of a step are spread over ranks; each has a contiguous slice of them."""

    ranks: int
    """Processes of the job."""
    micro_rows: int
    """Rows of one forward and backward pass on one rank."""
    zero_stage: int
    """1: ranks meet once a step; 2 (reduces) and 3 (gathers): at every micro-step."""

    @property
    def is_meeting_often(self) -> bool:
        """Whether ranks wait for each other at every micro-step."""
        return self.zero_stage > 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wait:
    """Time of the core's work over what it would be if ranks shared the work evenly."""

    slowest: float
    """Mean work of the slowest rank over the mean work of a rank; 1: nobody waits."""
    error: float
    """Its standard error."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """The depth of each row of consecutive steps."""

    depth: DepthConfig
    """The law, scope and sampling that were simulated."""
    totals: NDArray[np.int64]
    """Iterations of the core for each row, int64 [steps, rows]."""

    @property
    def work(self) -> NDArray[np.int64]:
        """Forward passes of the core, int64 [steps, rows]."""
        return core_work(self.totals, self.depth.backprop)

    @property
    def steps(self) -> int:
        """Optimizer steps simulated."""
        return len(self.totals)

    @property
    def step_variation(self) -> float:
        """Coefficient of variation of whole steps' work: how much the time of steps differs."""
        steps = self.work.sum(axis=1)
        return float(steps.std(ddof=1) / steps.mean()) if len(steps) > 1 else 0.0

    def wait(self, layout: Layout) -> Wait:
        """How long ranks wait; each runs its deepest rows first."""
        steps, work = self.steps, self.work
        slowest = slowest_rank(work, layout)
        mean = work.sum(axis=1) / layout.ranks
        ratio = float(slowest.sum() / mean.sum())
        # of a ratio of means: the spread of what the ratio does not explain
        spread = (
            float((slowest - ratio * mean).std(ddof=1) / mean.mean()) if steps > 1 else math.inf
        )
        return Wait(slowest=ratio, error=spread / math.sqrt(steps))


def slowest_rank(
    work: NDArray[np.int64] | NDArray[np.float64], layout: Layout
) -> NDArray[np.float64]:
    """Work [steps, rows] that each step waits for, [steps], where ranks run deepest rows first.

    Where ranks meet at every micro-step, it is the sum of the largest micro-batches.
    """
    steps, rows = work.shape
    assert rows % (layout.ranks * layout.micro_rows) == 0, (rows, layout)
    of_ranks = work.reshape(steps, layout.ranks, -1)
    if layout.is_meeting_often:
        deepest_first = -np.sort(-of_ranks, axis=2)
        micro = deepest_first.reshape(steps, layout.ranks, -1, layout.micro_rows).sum(axis=3)
        slowest = micro.max(axis=1).sum(axis=1)
    else:
        slowest = of_ranks.sum(axis=2).max(axis=1)
    return slowest.astype(np.float64)


def simulate(depth: DepthConfig, *, seed: int, rows: int, steps: int) -> Simulation:
    """`steps` steps with `rows` rows each, as training deals them once a curriculum is over."""
    law = settled(depth)
    totals = [
        step_totals(law, seed=seed, first_row=step * rows, rows=rows) for step in range(steps)
    ]
    return Simulation(depth=depth, totals=np.stack(totals))


def affordable_steps(rows: int, *, seconds: float) -> int:
    """Steps that are simulated in about `seconds` on one slow core; 2 to 64."""
    # measured: 1.5 ms a step and 3 us a row
    return min(max(int(seconds / (1.5e-3 + 3e-6 * rows)), 2), 64)


def alternatives(depth: DepthConfig, *, rows: int, block_rows: int) -> list[DepthConfig]:
    """The same law under every scope and sampling; blocks of `block_rows` rows if they divide."""
    found = []
    for scope in Scope:
        for sampling in Sampling:
            if scope is Scope.block and rows % block_rows:
                continue
            is_given = scope is depth.scope and sampling is depth.sampling
            found.append(
                dataclasses.replace(
                    depth,
                    scope=scope,
                    sampling=sampling,
                    lanes=depth.lanes if is_given else None,
                    block_rows=block_rows if scope is Scope.block else 1,
                )
            )
    return found
