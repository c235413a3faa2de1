"""What the ranks of the straggler tests run; imported by path, in processes of their own."""

import logging
import time

from pretrain.engine.world import World
from pretrain.loop.guard_config import GuardConfig
from pretrain.loop.stragglers import Stragglers


def one_is_slow(world: World, slow: int) -> tuple[list[dict[str, float]], list[str]]:
    """Eight steps of sleeping, in which each rank has its own work and one is twice as slow."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pretrain.loop.stragglers").addHandler(handler)
    stragglers = Stragglers(world, GuardConfig(straggler_every_steps=4, straggler_ratio=1.4))
    found = []
    for _ in range(8):
        work = 1.0 + world.rank
        started = time.monotonic()
        time.sleep(0.02 * work * (2 if world.rank == slow else 1))
        found.append(stragglers.add(own_s=time.monotonic() - started, work=work))
    return found, said
