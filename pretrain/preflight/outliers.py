"""Which of many equal parts is too slow. Torch-free."""

import statistics
from collections.abc import Sequence

# Slower by this share: what one slow part costs the whole job, which waits for it.
SLOWER_BY = 0.10
ROBUST_SIGMAS = 3.0
# Makes the median absolute deviation of normally distributed values their standard deviation.
MAD_TO_SIGMA = 1.4826


def slow_ones(rates: Sequence[float]) -> list[int]:
    """Indices of rates that are too low for equal parts; higher is faster.

    Three or more: below the median by more than a tenth of it, and by more than three robust
    sigmas, so that parts which all scatter widely accuse nobody. A rate that more than half of the
    parts share has a sigma of 0, and only the tenth counts; if half of them are slow, none is
    named, since nobody knows which half is right.
    Two: the median lies between them and each is one deviation away, so sigmas say nothing. The
    slower one is named if it is slower by more than a tenth: too fast a part there is none.
    One, or none: nothing to compare.
    """
    if len(rates) < 2:
        return []
    if len(rates) == 2:
        reference, sigma = max(rates), 0.0
    else:
        reference = statistics.median(rates)
        sigma = MAD_TO_SIGMA * statistics.median(abs(rate - reference) for rate in rates)
    limit = reference - max(SLOWER_BY * reference, ROBUST_SIGMAS * sigma)
    return [index for index, rate in enumerate(rates) if rate < limit]
