"""Long curves with few points, without hiding a spike."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def thin(values: Sequence[float] | Floats, buckets: int) -> NDArray[np.int64]:
    """Which values to draw, ascending: the smallest and the largest finite one of each bucket.

    The first and the last are always among them, and so is the first of a bucket's values that
    are not finite. At most 3 x buckets + 2; all of them if there are no more than that.
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) <= 3 * buckets + 2:
        return np.arange(len(array))
    kept: set[int] = {0, len(array) - 1}
    edges = np.linspace(0, len(array), buckets + 1).astype(np.int64)
    for first, after in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        part = array[first:after]
        is_finite = np.isfinite(part)
        if is_finite.any():
            kept.add(first + int(np.argmin(np.where(is_finite, part, np.inf))))
            kept.add(first + int(np.argmax(np.where(is_finite, part, -np.inf))))
        if not is_finite.all():
            kept.add(first + int(np.argmin(is_finite)))
    return np.array(sorted(kept), dtype=np.int64)


def bucket_means(values: Sequence[float] | Floats, buckets: int) -> list[float]:
    """Mean of the finite values of each bucket, NaN for a bucket without; at most `buckets`."""
    array = np.asarray(values, dtype=np.float64)
    parts: list[Any] = np.array_split(array, min(buckets, len(array))) if len(array) else []
    finite = [part[np.isfinite(part)] for part in parts]
    return [float(part.mean()) if len(part) else float("nan") for part in finite]
