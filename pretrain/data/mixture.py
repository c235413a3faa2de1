"""Which source each global row comes from: exact proportions at every prefix, no randomness.

Weights become whole numbers of rows in a period of 10,000. Inside a period Tijdeman's method
deals the rows: after any number of rows, every source has had its share to within one row.
Source: R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980).
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pretrain.errors import ConfigError

PERIOD = 10_000

Ints = npt.NDArray[np.int64]


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Split `total` by weight into whole numbers: largest remainders, ties to the first.

    A positive weight gets at least one. Raises ConfigError if there are more of them than `total`.
    """
    positive = sum(weight > 0 for weight in weights)
    if positive > total:
        raise ConfigError(f"{positive} sources have a weight, but there are only {total} rows.")
    exact = [weight / sum(weights) * total for weight in weights]
    shares = [max(int(share), int(share > 0)) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: max(total - sum(shares), 0)]:
        shares[i] += 1
    # sources lifted to one may have taken too many: give back where the excess is largest
    while sum(shares) > total:
        i = max((i for i in range(len(exact)) if shares[i] > 1), key=lambda i: shares[i] - exact[i])
        shares[i] -= 1
    return shares


@lru_cache(maxsize=8)
def _deal(shares: tuple[int, ...]) -> list[int]:
    """A source for each row of a period, so that every prefix has its shares to within one."""
    period, present = sum(shares), [i for i, share in enumerate(shares) if share]
    if len(present) == 1:
        return present * period
    scale = 2 * len(present) - 2
    count = [0] * len(shares)
    dealt = []
    for row in range(1, period + 1):
        chosen, best = -1, 0
        for i in present:
            # scale * period times what the source would lack after this row
            lack = scale * (shares[i] * row - period * count[i])
            slack = (scale - 1) * period - lack
            # of those that may have a row, the one that must have it soonest: least slack / share
            if lack >= period and (chosen < 0 or slack * shares[chosen] < best * shares[i]):
                chosen, best = i, slack
        count[chosen] += 1
        dealt.append(chosen)
    return dealt


class Mixture:
    """The source of every global row, and how many rows of it came before."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Raises ConfigError if no weight is positive."""
        if not any(weight > 0 for weight in weights):
            raise ConfigError(
                "No source has a weight above 0; give at least one a positive weight."
            )
        self.shares = apportion(weights, PERIOD)
        dealt = np.array(_deal(tuple(self.shares)), dtype=np.int64)
        self._source = dealt
        self._before = np.empty(PERIOD, dtype=np.int64)
        for source in range(len(self.shares)):
            mine = dealt == source
            self._before[mine] = np.arange(int(mine.sum()))

    def place(self, rows: Ints) -> tuple[Ints, Ints]:
        """Source of each global row, and the number of its rows before that one."""
        period, inside = np.divmod(rows, PERIOD)
        source = self._source[inside]
        return source, period * np.array(self.shares)[source] + self._before[inside]

    def counts(self, rows: int) -> Ints:
        """Rows of each source among the first so many."""
        periods, rest = divmod(rows, PERIOD)
        in_rest = np.bincount(self._source[:rest], minlength=len(self.shares))
        return periods * np.array(self.shares, dtype=np.int64) + in_rest.astype(np.int64)


class Phases:
    """Mixtures that follow one another; each source goes on where the phase before left it."""

    def __init__(self, phases: Sequence[tuple[int, Mixture]]) -> None:
        """`phases`: the global row that each begins at, ascending from 0, and its mixture."""
        assert phases[0][0] == 0
        self.phases = list(phases)
        self._starts = np.array([start for start, _ in phases], dtype=np.int64)
        taken = np.zeros(len(phases[0][1].shares), dtype=np.int64)
        self._taken = [taken]
        for (start, mixture), (end, _) in pairwise(phases):
            taken = taken + mixture.counts(end - start)
            self._taken.append(taken)

    def number(self, row: int) -> int:
        """Which phase a global row belongs to, from 0."""
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def place(self, rows: Ints) -> tuple[Ints, Ints]:
        """Source of each global row, and the number of its rows before that one."""
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        sources, taken = np.empty_like(rows), np.empty_like(rows)
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            start, mixture = self.phases[number]
            source, before = mixture.place(rows[mine] - start)
            sources[mine], taken[mine] = source, before + self._taken[number][source]
        return sources, taken

    def counts(self, rows: int) -> Ints:
        """Rows of each source among the first so many of the run."""
        number = self.number(max(rows - 1, 0))
        start, mixture = self.phases[number]
        return self._taken[number] + mixture.counts(rows - start)
