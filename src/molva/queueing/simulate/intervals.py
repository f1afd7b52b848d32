"""Intervals from batches: the jackknife for functions of sums, and inverted for percentiles.

Every quantity is a function of sums over the run: a mean wait is a sum over a count, an scv a
function of three. The jackknife takes it over all batches but one, each time another; what
that changes has nearly the spread of the quantity itself, whatever the function (Miller, 1974).
"""

import math
from collections.abc import Callable
from typing import Final, final

import numpy as np

from molva.queueing.simulate.draws import Floats
from molva.queueing.simulate.estimate import Estimate
from molva.queueing.simulate.tally import Integers

__all__ = [
    "Histogram",
    "Quantity",
    "half_width",
    "interval",
    "lag_correlation",
    "pseudo_values",
    "student",
]

# A function of sums: of an array whose last axis is that of a tally's sums.
Quantity = Callable[[Floats], Floats]

# The 97.5 % point of Student's t for 1, 2, … degrees of freedom.
_STUDENT: Final = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)

# The 97.5 % point of the normal distribution.
_NORMAL: Final = 1.959964


def student(freedom: int) -> float:
    """Return the 97.5 % point of Student's t, to four digits."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    # Fisher's expansion in 1/freedom.
    z = _NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def pseudo_values(batches: Floats, quantity: Quantity) -> Floats:
    """Return what each batch says of ``quantity``; their mean is its estimate, nearly.

    Args:
        batches: Sums, shape ``(batches, sums)``.
        quantity: Function of them.
    """
    total = batches.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        without = quantity(total - batches)
        whole = quantity(total)
    number = len(batches)
    values: Floats = number * whole - (number - 1) * without
    return values


def interval(batches: Floats, quantity: Quantity) -> Estimate | None:
    """Return the estimate of ``quantity``; None where the batches do not determine it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(quantity(batches.sum(axis=0)))
    if not math.isfinite(value):
        return None
    half = half_width(pseudo_values(batches, quantity))
    if not math.isfinite(half):
        return None
    return Estimate(value, value - half, value + half)


def half_width(pseudo: Floats) -> float:
    """Return half of the width of the interval that pseudo-values give."""
    number = len(pseudo)
    return student(number - 1) * float(np.std(pseudo, ddof=1)) / math.sqrt(number)


def lag_correlation(values: Floats) -> float:
    """Return the correlation of neighbours over its standard error; shape (runs, batches)."""
    runs, number = values.shape
    away = values - values.mean()
    square = float((away * away).mean())
    if number < 2 or square == 0:
        return 0.0
    pairs = runs * (number - 1)
    return float((away[:, 1:] * away[:, :-1]).sum() / pairs / square) * math.sqrt(pairs)


@final
class Histogram:
    """A distribution from the histograms of batches.

    Attributes:
        counts: Jobs in each bin, shape ``(batches, bins)``.
    """

    def __init__(self, counts: Integers, edges: Floats, unit: float, *, is_exact: bool) -> None:
        """Make it.

        Args:
            counts: Jobs in each bin, shape ``(batches, bins)``.
            edges: Of the bins, ascending, one more than there are bins.
            unit: Seconds in one unit of the edges.
            is_exact: Whether all times are whole numbers of units.
        """
        # Most bins are empty; a result that is kept should not be large for that.
        used = np.flatnonzero(counts.sum(axis=0))
        last = int(used[-1]) + 1 if used.size else 1
        self.counts = counts[:, :last].copy()
        self._edges, self._unit, self._is_exact = edges[: last + 1], unit, is_exact
        # Jobs up to the upper edge of each bin, in all batches together.
        self._below = np.concatenate([[0], np.cumsum(self.counts.sum(axis=0))]).astype(float)

    def percentile(self, share: float) -> Estimate | None:
        """Return what ``share`` of the jobs do not exceed, in seconds."""
        seconds = self.sampled(share)
        value = self._at(share)
        half = self._half_width(value)
        if share + half >= 1:
            return None
        low, high = self._at(max(share - half, 0.0)), self._at(share + half)
        return Estimate(seconds, low * self._unit, high * self._unit)

    def sampled(self, share: float) -> float:
        """Return what ``share`` of the jobs that were played did not exceed, in seconds."""
        if not 0 <= share < 1:
            raise ValueError(f"a percentile is a share from 0 to below 1, as 0.99; not {share}")
        return self._at(share) * self._unit

    def tail(self, t: float) -> Estimate:
        """Return P(T > t), t ≥ 0 in seconds."""
        at = t / self._unit
        jobs = self._below[-1]
        above = 1 - float(self._up_to(at, self._below[np.newaxis])[0]) / jobs
        half = self._half_width(at)
        return Estimate(above, max(above - half, 0.0), min(above + half, 1.0))

    def _half_width(self, at: float) -> float:
        """Return half of the width of the interval of the share of jobs up to ``at``."""
        below = np.concatenate(
            [np.zeros((len(self.counts), 1)), np.cumsum(self.counts, axis=1)], axis=1
        )
        sums = np.column_stack([self._up_to(at, below), below[:, -1]])
        return half_width(pseudo_values(sums, lambda total: total[..., 0] / total[..., 1]))

    def _up_to(self, at: float, below: Floats) -> Floats:
        """Return the jobs up to ``at``, of each row of cumulated counts."""
        place = int(np.searchsorted(self._edges, at, side="right")) - 1
        if place < 0:
            # All of the first bin counts as 0.
            return below[:, 1]
        if place >= self._edges.size - 1:
            return below[:, -1]
        if place == 0 or self._is_exact:
            return below[:, place + 1]
        low, high = self._edges[place], self._edges[place + 1]
        part = (at - low) / (high - low)
        within: Floats = below[:, place] + part * (below[:, place + 1] - below[:, place])
        return within

    def _at(self, share: float) -> float:
        """Return the time up to which ``share`` of all jobs are, in units."""
        wanted = share * self._below[-1]
        # The first bin at whose upper edge there are enough; rounding must not skip an atom.
        place = int(np.searchsorted(self._below[1:], wanted * (1 - 1e-12), side="left"))
        if place == 0:
            return 0.0
        low, high = float(self._edges[place]), float(self._edges[place + 1])
        if self._is_exact:
            return math.ceil(low)
        inside = self._below[place + 1] - self._below[place]
        part = (wanted - self._below[place]) / inside if inside else 0.0
        return float(low + min(max(part, 0.0), 1.0) * (high - low))
