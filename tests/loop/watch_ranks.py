"""What the ranks of these tests run; imported by path, in processes of their own."""

import ctypes
import logging
import os
import time
from pathlib import Path

from pretrain.engine.world import World
from pretrain.loop.guard_config import GuardConfig
from pretrain.loop.stragglers import Stragglers
from pretrain.loop.watchdog import Watchdog


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


def one_keeps_the_interpreter(world: World, run_dir: Path, keeper: int) -> None:
    """A rank is caught in C code that no other thread of it can run beside; the others wait."""
    with Watchdog(world, run_dir, limit_s=2) as watch:
        watch.enter(1, "data")
        if world.rank == keeper:
            ctypes.PyDLL(None).sleep(60)
        watch.enter(1, "reduce")
        world.barrier()


def one_cannot_write(world: World, run_dir: Path) -> None:
    """Rank 1 holds up the others, and what it then writes into never takes it."""
    if world.rank == 1:
        # opening a pipe that nobody reads blocks, as a disk that hangs does
        os.mkfifo(run_dir / "logs/rank-00001.stacks")
    with Watchdog(world, run_dir, limit_s=1) as watch:
        watch.enter(1, "data")
        if world.rank == 1:
            time.sleep(60)
        watch.enter(1, "reduce")
        world.barrier()
