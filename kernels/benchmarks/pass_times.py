"""How long a forward and backward pass of one row takes, by its depth: a + b n + c k.

n iterations run without gradient and k with it; a is prelude, coda and head.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Fit(NamedTuple):
    """Seconds."""

    terms: np.ndarray
    """a, b and c."""
    residual: float
    """The largest, relative."""

    @staticmethod
    def of(seconds: Mapping[tuple[int, int], float]) -> "Fit | None":
        """By least squares, of passes at several (n, k); None if those are too few."""
        terms = np.array([[1, *depth] for depth in seconds], dtype=float)
        if len(terms) < 3 or np.linalg.matrix_rank(terms) < 3:
            return None
        measured = np.array(list(seconds.values()))
        fit, *_ = np.linalg.lstsq(terms, measured, rcond=None)
        return Fit(fit, float(np.abs(terms @ fit / measured - 1).max()))

    def __str__(self) -> str:
        a, b, c = 1e3 * self.terms
        return f"{a:.1f} + {b:.2f} n + {c:.2f} k ms, largest residual {self.residual:.2%}"
