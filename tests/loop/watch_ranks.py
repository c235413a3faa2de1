"""What the ranks of these tests run; imported by path, in processes of their own."""

import ctypes
import logging
import os
import time
from pathlib import Path
from typing import Any

from pretrain.engine.world import World
from pretrain.loop.guard_config import GuardConfig
from pretrain.loop.stragglers import Stragglers
from pretrain.loop.watchdog import Watchdog
from pretrain.model.recurrent import RecurrentModel


def one_is_slow(world: World, slow: int) -> tuple[list[dict[str, float]], list[str]]:
    """Eight steps, in which each rank has its own work and one takes twice as long for its own."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pretrain.loop.stragglers").addHandler(handler)
    stragglers = Stragglers(world, GuardConfig(straggler_every_steps=4, straggler_ratio=1.4))
    found = []
    for _ in range(8):
        iterations = 1 + world.rank
        own_s = 0.02 * iterations * (2 if world.rank == slow else 1)
        found.append(stragglers.add(own_s=own_s, iterations=iterations))
    return found, said


def slow_down_rank_1() -> None:
    """In a process of a run, before it starts: every forward pass of rank 1 takes longer."""
    forward = RecurrentModel.forward

    def late(model: RecurrentModel, *args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == "1":
            time.sleep(0.2)
        return forward(model, *args, **kwargs)

    RecurrentModel.forward = late  # type: ignore[method-assign]


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
