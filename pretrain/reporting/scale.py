"""Axes: where a value lies between two edges, and which values are worth a label."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """How values are spread along an axis."""

    linear = "linear"
    log = "log"
    log2 = "log2"


@dataclass(frozen=True, slots=True)
class Scale:
    """Values from `low` to `high` onto pixels from `start` to `stop`."""

    kind: Kind
    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        share = (self._of(value) - self._of(self.low)) / (self._of(self.high) - self._of(self.low))
        return self.start + share * (self.stop - self.start)

    def ticks(self, most: int) -> list[float]:
        """Round values between the edges."""
        if self.kind is Kind.linear:
            return _linear_ticks(self.low, self.high, most)
        base = 2.0 if self.kind is Kind.log2 else 10.0
        first = math.ceil(math.log(self.low, base) - 1e-9)
        last = math.floor(math.log(self.high, base) + 1e-9)
        if last - first < 2 and self.kind is Kind.log:
            return self._few_decades(first, last, most)
        stride = max(1, -(-(last - first + 1) // most))
        return [base**power for power in range(first, last + 1, stride)]

    def _few_decades(self, first: int, last: int, most: int) -> list[float]:
        """1, 2 and 5 times powers of ten, or evenly spaced values where even these are rare."""
        found = [m * 10.0**power for power in range(first - 1, last + 1) for m in (1, 2, 5)]
        within = [value for value in found if self.low <= value <= self.high]
        return within if len(within) >= 3 else _linear_ticks(self.low, self.high, most)

    def _of(self, value: float) -> float:
        return value if self.kind is Kind.linear else math.log(max(value, 1e-300))


def fit(
    values: Iterable[float],
    kind: Kind,
    *,
    start: float,
    stop: float,
    pad: float = 0.0,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> Scale:
    """A scale that holds all finite values (on a logarithmic one: all positive), with room.

    A linear one ends at `limits` at the latest.
    """
    is_log = kind is not Kind.linear
    finite = [value for value in values if math.isfinite(value) and (value > 0 or not is_log)]
    low, high = (min(finite), max(finite)) if finite else (1.0, 2.0)
    if low == high:
        low, high = (low / 2, high * 2) if is_log else (low - abs(low) / 2, high + abs(high) / 2)
    if low == high:
        low, high = 0.0, 1.0
    if is_log:
        room = (high / low) ** pad
        return Scale(kind, low / room, high * room, start, stop)
    room = (high - low) * pad
    # what is never negative gets no room below zero
    floor = 0.0 if low >= 0 and low - room < 0 else low - room
    return Scale(kind, max(floor, limits[0]), min(high + room, limits[1]), start, stop)


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]
