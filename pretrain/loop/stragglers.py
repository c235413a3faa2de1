"""Ranks that are slower than the others at equal work, by name.

A rank's own seconds are those of its forward passes and of waiting for data: in a backward pass it
may wait for the others, whose gradients it adds. Its work are the iterations of the core, since
depths differ. Under ZeRO-3 ranks meet in forward passes too, which hides who is slow there.
"""

import logging
import socket
import statistics

from pretrain.engine.world import World
from pretrain.loop.guard_config import GuardConfig

log = logging.getLogger(__name__)


class Stragglers:
    """Compares the ranks after every guards.straggler_every_steps steps; all call it together."""

    def __init__(self, world: World, config: GuardConfig) -> None:
        self._world, self._config = world, config
        self._steps = 0
        self._seconds, self._iterations = 0.0, 0

    def add(self, *, own_s: float, iterations: int) -> dict[str, float]:
        """Count a step; metrics when it completes a comparison, else nothing."""
        self._steps += 1
        self._seconds += own_s
        self._iterations += iterations
        if self._steps < self._config.straggler_every_steps or self._world.size == 1:
            return {}
        mine = (self._seconds / max(self._iterations, 1), socket.gethostname())
        self._steps, self._seconds, self._iterations = 0, 0.0, 0
        found = self._world.gather_objects(mine)
        median = statistics.median(seconds for seconds, _ in found)
        ratios = [seconds / median for seconds, _ in found]
        slowest = max(range(len(ratios)), key=ratios.__getitem__)
        if self._world.is_main:
            self._say(ratios, [host for _, host in found])
        return {"ranks/slowest": slowest, "ranks/slowest_ratio": ratios[slowest]}

    def _say(self, ratios: list[float], hosts: list[str]) -> None:
        slow = [rank for rank, ratio in enumerate(ratios) if ratio > self._config.straggler_ratio]
        if slow:
            named = ", ".join(f"rank {rank} on {hosts[rank]} {ratios[rank]:.2f}" for rank in slow)
            log.warning(
                "stragglers over %d steps, as multiples of the median time for equal work "
                "(guards.straggler_ratio=%g): %s",
                self._config.straggler_every_steps,
                self._config.straggler_ratio,
                named,
            )
