"""Which items are measured together, and by which rank: results never depend on the ranks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from pretrain.data.progress import Progress
from pretrain.engine.world import World

Result = TypeVar("Result")
Batch = list[int]


def batches_by_length(lengths: Sequence[int], *, most_tokens: int, most_rows: int) -> list[Batch]:
    """Indices of rows of similar length, the longest first.

    A batch, padded to its longest row, has at most so many tokens (one row always fits) and rows.
    Nothing here knows of ranks: batches are dealt whole, so each is the same on any number.
    """
    batches: list[Batch] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and (
            len(batches[-1]) < most_rows and longest * (len(batches[-1]) + 1) <= most_tokens
        ):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def share(
    world: World,
    name: str,
    batches: Sequence[Batch],
    work: Callable[[Batch], Sequence[Result]],
) -> list[Result]:
    """What `work` gives for every index of every batch, in order, on every rank.

    Each rank works on every so-many-th batch; all ranks must call.
    """
    own: dict[int, Result] = {}
    mine = batches[world.rank :: world.size]
    with _progress(world, name, sum(map(len, mine))) as advance:
        for batch in mine:
            own |= dict(zip(batch, work(batch), strict=True))
            advance(len(batch))
    merged = {index: found for part in world.gather_objects(own) for index, found in part.items()}
    return [merged[index] for index in sorted(merged)]


@contextmanager
def _progress(world: World, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left, of rank 0's share, which is as large as any other."""
    if not world.is_main:
        yield lambda _: None
        return
    with Progress(name, total) as progress:
        yield lambda count: progress.advance(steps=count)
