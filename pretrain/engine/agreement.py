"""Deeds that all ranks do, or none: a failure on one becomes a failure on every one."""

from collections.abc import Callable
from typing import TypeVar

from pretrain.engine.world import World
from pretrain.errors import CheckpointError

T = TypeVar("T")


def together(world: World, action: Callable[[], T]) -> list[T]:
    """Every rank acts, and all get all results; or all raise CheckpointError if one could not.

    OSError and CheckpointError are what an action may fail of.
    """
    try:
        mine: tuple[T | None, str] = (action(), "")
    except (OSError, CheckpointError) as error:
        mine = (None, f"rank {world.rank}: {error}")
    results = world.gather_objects(mine)
    if errors := [error for _, error in results if error]:
        raise CheckpointError(
            "\n  ".join([f"{len(errors)} of {world.size} ranks failed:", *errors])
        )
    return [result for result, _ in results]


def on_main(world: World, action: Callable[[], object]) -> None:
    """Rank 0 acts; either it has succeeded or all ranks raise CheckpointError."""
    together(world, action if world.is_main else lambda: None)
