"""Rows that a run goes past because a loss spike began among them: `rewinds.jsonl`.

A line is one rewind: `from_step` went back to `to_step`; rows from `first_row` on were passed over
up to `next_row`. A run that arrives at such rows, in whatever life, goes on behind them.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

from pretrain.errors import CheckpointError

FILE = "rewinds.jsonl"


class Rewind(NamedTuple):
    """One line of the file."""

    from_step: int
    to_step: int
    first_row: int
    next_row: int


def read_rewinds(run_dir: Path) -> list[Rewind]:
    """The rewinds of a run, oldest first. Raises CheckpointError if the file is damaged."""
    path = run_dir / FILE
    if not path.exists():
        return []
    try:
        # what is no UTF-8 is a ValueError too
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Rewind(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): without it rows would be trained on that the run went "
            "past. Restore the file, or correct the line by hand."
        ) from error


def append_rewind(run_dir: Path, rewind: Rewind) -> None:
    """Remember one more, whole or not at all, through a power cut."""
    path = run_dir / FILE
    before = path.read_bytes() if path.exists() else b""
    draft = path.with_name(f"{FILE}.tmp-{os.getpid()}")
    with draft.open("wb") as file:
        file.write(before + json.dumps(rewind._asdict()).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def windows(rewinds: list[Rewind], *, before: int) -> list[tuple[int, int]]:
    """First row and the row behind the last of each stretch that was passed over before a row.

    Apart and ascending: a run that went back to one place twice has two lines that overlap.
    """
    found: list[tuple[int, int]] = []
    reached = 0
    for rewind in sorted(rewinds, key=lambda rewind: rewind.first_row):
        first, behind = max(rewind.first_row, reached), min(rewind.next_row, before)
        if first < behind:
            found.append((first, behind))
            reached = behind
    return found


def row_after(rewinds: list[Rewind], row: int) -> int:
    """`row`, or the first one behind the passed-over rows that it is among."""
    for rewind in sorted(rewinds, key=lambda rewind: rewind.first_row):
        if rewind.first_row <= row < rewind.next_row:
            row = rewind.next_row
    return row
