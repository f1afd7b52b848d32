"""Sums over a Poisson distribution, which is how a memoryless server turns counts into times.

The i-th departure of servers that complete x jobs in the mean by time t has come with the
probability that a Poisson count of mean x reaches i. Sums of such terms have no cancellation,
and only counts near x matter.
"""

import math
from collections.abc import Callable
from typing import Final

__all__ = ["expectation", "log_pmf", "pmf", "window"]

# Half a window in standard deviations, and what small means need beside it. Outside, a
# Poisson count has less than 1e-22: lossless in sums of order 1, and tails that small.
_DEVIATIONS: Final = 10.0
_MARGIN: Final = 60.0


def log_pmf(count: int, mean: float) -> float:
    """Return ln P(N = count)."""
    if mean == 0:
        return 0.0 if count == 0 else -math.inf
    return count * math.log(mean) - mean - math.lgamma(count + 1)


def window(mean: float) -> tuple[int, int]:
    """Return the first and the last count that matter."""
    half = _DEVIATIONS * math.sqrt(mean) + _MARGIN
    return max(0, math.floor(mean - half)), math.ceil(mean + half)


def pmf(mean: float, first: int, last: int) -> list[float]:
    """Return P(N = i) for first ≤ i ≤ last, accurate also for a mean of 10⁹.

    Starts at the count of largest probability, from Stirling's series, because ln Γ of a
    large number has lost the digits that its exponential needs.
    """
    if last < first:
        return []
    if mean == 0:
        return [1.0 if i == 0 else 0.0 for i in range(first, last + 1)]
    start = min(max(math.floor(mean), first), last)
    values = {start: _pmf_at(start, mean)}
    for i in range(start + 1, last + 1):
        values[i] = values[i - 1] * mean / i
    for i in range(start - 1, first - 1, -1):
        values[i] = values[i + 1] * (i + 1) / mean
    return [values[i] for i in range(first, last + 1)]


def _pmf_at(count: int, mean: float) -> float:
    if count < 20:
        return math.exp(log_pmf(count, mean))
    # n! = √(2πn) (n/e)ⁿ exp(δ): with u = mean/n − 1 what is left is n (ln(1+u) − u) − δ.
    u = (mean - count) / count
    n2 = count * count
    delta = (1 / 12 - (1 / 360 - (1 / 1260 - 1 / (1680 * n2)) / n2) / n2) / count
    core = math.log1p(u) - u if abs(u) > 1e-3 else _log1p_less(u)
    return math.exp(count * core - delta) / math.sqrt(2 * math.pi * count)


def _log1p_less(u: float) -> float:
    """Return ln(1+u) − u near 0, where the difference cancels."""
    return math.fsum(-((-u) ** k) / k for k in range(2, 9))


def expectation(mean: float, value: Callable[[int], float]) -> float:
    """Return E[value(N)] for a Poisson count N."""
    first, last = window(mean)
    return math.fsum(
        p * value(i) for i, p in enumerate(pmf(mean, first, last), start=first) if p > 0
    )
