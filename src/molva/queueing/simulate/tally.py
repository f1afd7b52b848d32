"""What is kept of a stretch of a run: sums and counts, and two histograms of fixed size.

Waits and times in system go into bins that are 1/128 of an octave's base wide: the upper
twelve bits of a double behind its sign are its exponent and the next seven its first digits, so
a shift finds the bin. So a percentile is known to 0.8 %, at any size, in memory that does not
grow.

Sums are taken from left to right, one job after the other, as the compiled kernel does: so
both give the same bits.
"""

from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from molva.queueing.simulate.draws import Floats

__all__ = [
    "BINS",
    "BIN_SHIFT",
    "NEVER",
    "Integers",
    "Sum",
    "Tally",
    "bin_edges",
    "flow_into",
    "jobs_into",
    "least_bin",
]

Integers = NDArray[np.int64]


class Sum(IntEnum):
    """Places in the sums of a tally. After the last come, for each class, jobs and waits."""

    ARRIVED = 0
    REFUSED = 1
    LEFT = 2  # admitted jobs that are done with: served or out of patience
    ABANDONED = 3
    WAITED = 4  # of those that left, with a wait above 0
    WAIT = 5
    WAIT_SQUARED = 6
    STAY = 7
    WORK = 8  # time for which servers were busy
    TIME = 9
    OUTPUT_GAPS = 10
    OUTPUT_GAP = 11
    OUTPUT_GAP_SQUARED = 12
    REFUSAL_GAPS = 13
    REFUSAL_GAP = 14
    REFUSAL_GAP_SQUARED = 15
    CLASSES = 16


# An instant before all others, which no shift of the origin moves.
NEVER: Final = -float("inf")

# Bits of a double below the seven that tell bins apart. One more, and percentiles are known to
# half as much; one less, and each histogram takes twice the memory.
BIN_SHIFT: Final = 45
_BINS_PER_OCTAVE: Final = 128

# From 2⁻²⁰ of a mean service time to 2²⁴ of it. What is shorter counts as the shortest.
_OCTAVES: Final = 44
_LEAST_OCTAVE: Final = -20
BINS: Final = _OCTAVES * _BINS_PER_OCTAVE


class Tally:
    """Sums and histograms of a stretch of a run. Tallies of stretches add up."""

    def __init__(self, classes: int) -> None:
        self.sums = np.zeros(Sum.CLASSES + 2 * classes)
        self.waits = np.zeros(BINS, np.int64)
        self.stays = np.zeros(BINS, np.int64)

    def add(self, other: "Tally") -> None:
        """Add what ``other`` counted."""
        self.sums += other.sums
        self.waits += other.waits
        self.stays += other.stays


def least_bin(service: float) -> int:
    """Return the number of the first bin, for a mean service time in units of the clock."""
    edge = np.array([service * 2.0**_LEAST_OCTAVE])
    return int(edge.view(np.int64)[0] >> BIN_SHIFT)


def bin_edges(least: int) -> Floats:
    """Return the lower edge of each bin, and the upper one of the last."""
    edges = np.arange(least, least + BINS + 1, dtype=np.int64) << BIN_SHIFT
    return edges.view(np.float64)


def jobs_into(tally: Tally, waits: Floats, stays: Floats, least: int) -> None:
    """Count jobs that are done with."""
    if not waits.size:
        return
    sums = tally.sums
    sums[Sum.LEFT] += waits.size
    sums[Sum.WAITED] += np.count_nonzero(waits > 0)
    sums[Sum.WAIT] += _total(waits)
    sums[Sum.WAIT_SQUARED] += _total(waits * waits)
    _count(tally.waits, waits, least)
    _count(tally.stays, stays, least)


def flow_into(tally: Tally, first: Sum, instants: Floats, last: float) -> float:
    """Count the gaps of a flow, which are three sums from ``first`` on.

    Args:
        tally: What counts.
        first: Of the three places: their number, their sum, their sum of squares.
        instants: Ascending.
        last: The instant before; ``NEVER`` where there is none.

    Returns:
        The last instant now.
    """
    if not instants.size:
        return last
    before = instants[:0] if last == NEVER else np.array([last])
    gaps = np.diff(np.concatenate([before, instants]))
    if gaps.size:
        tally.sums[first] += gaps.size
        tally.sums[first + 1] += _total(gaps)
        tally.sums[first + 2] += _total(gaps * gaps)
    return float(instants[-1])


def _total(numbers: Floats) -> float:
    # Not sum(), which adds in pairs: another order, other bits.
    return float(np.cumsum(numbers)[-1])


def _count(bins: Integers, times: Floats, least: int) -> None:
    places = (times.view(np.int64) >> BIN_SHIFT) - least
    np.clip(places, 0, BINS - 1, out=places)
    bins += np.bincount(places, minlength=BINS)
