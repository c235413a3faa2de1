"""A run's record as columns, read as it grows.

Unlike `read_metrics` this keeps no object per step, goes on where it stopped, and counts damaged
lines instead of refusing them: a page or a terminal must show a run that is being written.
"""

import os
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.loop.metrics import decode_record
from pretrain.loop.sink import HISTOGRAM


@dataclass(slots=True)
class Series:
    """One metric over a run, oldest first: 24 bytes a value."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    tokens: "array[float]" = field(default_factory=lambda: array("d"))
    values: "array[float]" = field(default_factory=lambda: array("d"))

    def add(self, step: int, tokens: float, value: float) -> None:
        """One more value."""
        self.steps.append(step)
        self.tokens.append(tokens)
        self.values.append(value)

    def __len__(self) -> int:
        return len(self.values)


class RunRecord:
    """metrics.jsonl so far; `refresh` takes in what was appended since.

    A file that was replaced or cut (a resume, a rewind) is read again from its start. A line
    without its end is left for the next look.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset, self._inode, self.num_damaged = 0, -1, 0
        self._forget()
        self.refresh()

    def refresh(self) -> bool:
        """Whether anything has changed. A file that is not there is an empty record."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return False
        with file:
            about = os.fstat(file.fileno())
            if self._inode != about.st_ino or about.st_size < self._offset:
                self._forget()
            self._inode, self.written_s = about.st_ino, about.st_mtime
            before = self._offset + self.num_damaged
            self._read_on(file)
        return self._offset + self.num_damaged != before

    def last(self, key: str) -> float | None:
        """The newest value of a metric, None if it has none."""
        series = self.series.get(key)
        return series.values[-1] if series else None

    @property
    def step(self) -> int:
        """The newest step."""
        return self._newest[0]

    @property
    def tokens(self) -> float:
        """Tokens consumed by then."""
        return self._newest[1]

    def _forget(self) -> None:
        self._offset = self.num_damaged = 0
        self._newest = (0, 0.0)
        self.series: dict[str, Series] = {}
        self.validations: list[dict[str, Any]] = []
        """Whole, with their lists and samples."""
        self.depth_counts: list[int] = []
        """Rows of all steps by depth, in the bins of depth/histogram."""
        self.written_s = 0.0
        """When the file was last written, seconds since 1970."""

    def _read_on(self, file: Any) -> None:
        file.seek(self._offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            self._offset += len(line)
            record = decode_record(line)
            if record is None:
                self.num_damaged += 1
            else:
                self._add(record)

    def _add(self, record: Mapping[str, Any]) -> None:
        step, tokens = record["step"], record.get("tokens", 0)
        self._newest = (step, float(tokens))
        for key, value in record.items():
            if key in ("step", "tokens") or isinstance(value, bool):
                continue
            if isinstance(value, int | float):
                self.series.setdefault(key, Series()).add(step, float(tokens), float(value))
        if _is_whole_validation(record):
            self.validations.append(dict(record))
        counts = record.get(HISTOGRAM)
        if isinstance(counts, list) and all(isinstance(count, int) for count in counts):
            before = self.depth_counts or [0] * len(counts)
            if len(before) == len(counts):
                self.depth_counts = [old + new for old, new in zip(before, counts, strict=True)]


def _is_whole_validation(record: Mapping[str, Any]) -> bool:
    depths, losses = record.get("validation/depths"), record.get("validation/loss_nats")
    if not isinstance(depths, list) or not isinstance(losses, list):
        return False
    numbers = all(isinstance(value, int | float) for value in [*depths, *losses])
    return numbers and len(depths) == len(losses) > 0
