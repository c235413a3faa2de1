"""Uninterrupted runs, on one, two and three ranks, that disturbed ones are compared with."""

from collections.abc import Callable
from pathlib import Path

import pytest
from lives import finish


@pytest.fixture(scope="session")
def whole(workspace: Path) -> Callable[[int], Path]:
    """The run folder of an uninterrupted run on so many ranks, made when first asked for."""
    made: dict[int, Path] = {}

    def run(ranks: int) -> Path:
        if ranks not in made:
            made[ranks] = finish(workspace, f"whole-of-{ranks}", ranks=ranks)
        return made[ranks]

    return run
