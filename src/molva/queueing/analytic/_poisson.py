"""Sums over a Poisson distribution, which is how a memoryless server turns counts into times.

The i-th departure of servers that complete x jobs in the mean by time t has come with the
probability that a Poisson count of mean x reaches i. Sums of such terms have no cancellation,
and only counts near x matter.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final

__all__ = ["expectation", "log_pmf", "pmf", "smooth_expectation", "window"]

# Half a window in standard deviations, and what small means need beside it. Outside, a
# Poisson count has less than 1e-22: lossless in sums of order 1, and tails that small.
_DEVIATIONS: Final = 10.0
_MARGIN: Final = 60.0

# Counts in a window above which blocks of them are summed by a rule of few points.
_MANY: Final = 2000

# Points of that rule: exact for polynomials of degree 23, so that a block may be as long as a
# standard deviation. And the counts next to a corner that are summed one by one.
_POINTS: Final = 12
_ONE_BY_ONE: Final = 16


def log_pmf(count: float, mean: float) -> float:
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


def _pmf_at(count: float, mean: float) -> float:
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


def smooth_expectation(mean: float, value: Callable[[float], float], corner: int) -> float:
    """Return E[value(N)] for a Poisson count N, which may be huge.

    Args:
        mean: E[N]; a large one takes hardly longer than a small one.
        value: Analytic also between whole numbers, up to ``corner`` and beyond it, on no smaller
            scale than the distance from there.
        corner: A count.
    """
    first, last = window(mean)
    if last - first > _MANY:
        return _expectation_by_blocks(mean, first, last, corner, value)
    return expectation(mean, value)


def _expectation_by_blocks(
    mean: float, first: int, last: int, corner: int, value: Callable[[float], float]
) -> float:
    spread = math.ceil(math.sqrt(mean))
    pieces = (
        [(first, last)] if not first <= corner < last else [(first, corner), (corner + 1, last)]
    )
    total = 0.0
    for low, high in pieces:
        from_low = abs(low - corner) < abs(high - corner)
        done = 0
        for count in _growing(high - low + 1, spread):
            begin = low + done if from_low else high - done - count + 1
            done += count
            for offset, weight in _rule(count):
                at = begin + (count - 1) / 2 + offset
                total += weight * _pmf_at(at, mean) * value(at)
    return total


def _growing(counts: int, longest: int) -> Iterator[int]:
    """Cut so many counts into blocks that double from the corner on, up to ``longest``."""
    length = _ONE_BY_ONE
    while counts > 0:
        taken = min(length, counts)
        yield taken
        counts -= taken
        length = min(2 * length, longest)


@lru_cache(maxsize=64)
def _rule(count: int) -> list[tuple[float, float]]:
    """Return offsets from the middle of ``count`` whole numbers, and their weights.

    Their sum is that over all, for polynomials: Gauss's rule for the discrete Chebyshev
    polynomials p₍ₖ₊₁₎ = x pₖ − bₖ p₍ₖ₋₁₎.
    """
    if count <= _ONE_BY_ONE:
        return [(i - (count - 1) / 2, 1.0) for i in range(count)]
    b = [k * k * (count * count - k * k) / (4 * (4 * k * k - 1)) for k in range(1, _POINTS)]
    norm = count * math.prod(b)
    rule = []
    for i in range(_POINTS):
        # From the zero of Legendre's polynomial by Newton's method.
        x = count / 2 * math.cos(math.pi * (i + 0.75) / (_POINTS + 0.5))
        for _ in range(20):
            before, here, slope_before, slope = 1.0, x, 0.0, 1.0
            for each in b:
                before, here, slope_before, slope = (
                    here,
                    x * here - each * before,
                    slope,
                    here + x * slope - each * slope_before,
                )
            x -= here / slope
        rule.append((x, norm / (slope * before)))
    return rule
