"""Means over items, and how far chance may have moved them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from pretrain.tasks.records import Kind


class Score(NamedTuple):
    """One number about a task at one depth."""

    value: float
    error: float | None
    """Standard error over items; None for a single item, which says nothing of it."""


class Outcome(NamedTuple):
    """What came of one task."""

    name: str
    kind: Kind
    depths: tuple[int, ...]
    scores: dict[str, list[Score]]
    """By the name of the measure, at each depth; the first is the one to look at."""
    items: list[dict[str, Any]]
    """One record per item, in the order of the file."""
    total: int
    """Items that the file has."""

    @property
    def measure(self) -> str:
        """The measure to look at first."""
        return next(iter(self.scores))

    def summary(self) -> dict[str, Any]:
        """Everything but the items."""
        return {
            "task": self.name,
            "kind": self.kind.value,
            "items": len(self.items),
            "items_in_file": self.total,
            "items_cut": sum(item["is_cut"] for item in self.items),
            "depths": list(self.depths),
            "scores": {
                name: {
                    "value": [score.value for score in scores],
                    "standard_error": [score.error for score in scores],
                }
                for name, scores in self.scores.items()
            },
        }


def mean(values: Sequence[float]) -> Score:
    """The mean of items and its standard error, from their own spread."""
    return ratio(values, [1.0] * len(values))


def ratio(tops: Sequence[float], bottoms: Sequence[float]) -> Score:
    """Sum of tops / sum of bottoms, where items differ in size.

    The error is the first-order one of a ratio of means over independent items; with equal
    bottoms it is the sample's standard deviation / sqrt(n).
    """
    value, n = sum(tops) / sum(bottoms), len(tops)
    if n < 2:
        return Score(value, None)
    squares = sum((top - value * bottom) ** 2 for top, bottom in zip(tops, bottoms, strict=True))
    return Score(value, math.sqrt(squares * n / (n - 1)) / sum(bottoms))
