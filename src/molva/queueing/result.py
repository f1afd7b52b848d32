"""What an analysis answers: the steady state of a station, how it was found and how surely.

A quantity is None where it is not defined, or not determined by what the model says; no
other meaning is hidden in a number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Protocol, final

from molva.queueing.model import Model

__all__ = [
    "APPROXIMATION",
    "CLOSED_FORM",
    "NUMERICAL",
    "Flow",
    "Multiset",
    "Shifted",
    "SteadyState",
    "Tail",
    "TimeLaw",
    "nothing_waits",
]

# The roads to a number, as reports print them. A simulation adds its own.
CLOSED_FORM: Final = "closed form"
NUMERICAL: Final = "numerical, error < 1e-10"
APPROXIMATION: Final = "approximation"

# Relative width at which the search for a percentile stops. Narrower than the rounding of a
# tail, and steps are taken that decide nothing.
_PERCENTILE_WIDTH: Final = 1e-13

# What stands for the logarithm of a tail that is 0.
_NO_TAIL: Final = -700.0


class TimeLaw(Protocol):
    """The whole distribution of a wait or of a time in system."""

    def tail(self, t: float) -> float:
        """Return P(T > t), t ≥ 0 in seconds."""

    def percentile(self, share: float) -> float:
        """Return the smallest t with P(T ≤ t) ≥ share, 0 ≤ share < 1, in seconds."""


@final
@dataclass(frozen=True, slots=True)
class Tail:
    """A distribution known by P(T > t), continuous above 0.

    Attributes:
        tail_at: P(T > t) for t ≥ 0, not increasing.
        scale: Seconds of the order of a typical value, where the search begins.
    """

    tail_at: Callable[[float], float]
    scale: float

    def tail(self, t: float) -> float:
        """Return P(T > t)."""
        return min(1.0, max(0.0, self.tail_at(t)))

    def percentile(self, share: float) -> float:
        """Return the smallest t with P(T ≤ t) ≥ share."""
        left = _left_over(share)
        if self.tail(0.0) <= left:
            return 0.0
        low, high = 0.0, self.scale
        while self.tail(high) > left:
            low, high = high, 2 * high
        return self._search(low, high, left)

    def _search(self, low: float, high: float, left: float) -> float:
        """Narrow a bracket by the ITP method: chords where they help, never worse than halving.

        Chords are of the logarithm, because that of a tail is nearly straight. Source:
        Oliveira and Takahashi, ACM Transactions on Mathematical Software 47 (2020).
        """

        def height(t: float) -> float:
            tail = self.tail(t)
            return math.log(tail / left) if tail > 0 else _NO_TAIL

        above, below = height(low), height(high)
        width = max(high * _PERCENTILE_WIDTH, 5e-324)
        bend = 0.2 / (high - low)
        radius = width * 2 ** (math.ceil(math.log2((high - low) / width)) + 1)
        while high - low > width:
            middle, half = (low + high) / 2, (high - low) / 2
            chord = (above * high - below * low) / (above - below)
            chord = middle if not low < chord < high else chord
            inwards = math.copysign(1.0, middle - chord)
            step = bend * (2 * half) ** 2
            at = chord + inwards * step if step <= abs(middle - chord) else middle
            reach = max(0.0, radius - half)
            at = at if abs(at - middle) <= reach else middle - inwards * reach
            if not low < at < high:
                break
            radius /= 2
            value = height(at)
            if value > 0:
                low, above = at, value
            else:
                high, below = at, value
        return high


@final
@dataclass(frozen=True, slots=True)
class Multiset:
    """A distribution on finitely many exact values, each as likely as the next.

    Attributes:
        values: Seconds, ascending, at least one.
    """

    values: tuple[Fraction, ...]

    def tail(self, t: float) -> float:
        """Return P(T > t)."""
        return sum(value > t for value in self.values) / len(self.values)

    def percentile(self, share: float) -> float:
        """Return the smallest value with P(T ≤ value) ≥ share."""
        _left_over(share)
        # In fractions: 0.9 of 10 values are 9, which the double 0.9 misses.
        wanted = math.ceil(Fraction(repr(share)) * len(self.values))
        return float(self.values[max(wanted, 1) - 1])


@final
@dataclass(frozen=True, slots=True)
class Shifted:
    """``law``, later by a constant: the time in system where every service takes the same.

    Attributes:
        law: What is shifted.
        by: Seconds.
    """

    law: TimeLaw
    by: float

    def tail(self, t: float) -> float:
        """Return P(T > t)."""
        return self.law.tail(t - self.by) if t >= self.by else 1.0

    def percentile(self, share: float) -> float:
        """Return the smallest t with P(T ≤ t) ≥ share."""
        return self.law.percentile(share) + self.by


def _left_over(share: float) -> float:
    if not 0 <= share < 1:
        raise ValueError(f"a percentile is a share from 0 to below 1, as 0.99; not {share}")
    return 1 - share


@final
@dataclass(frozen=True, slots=True)
class Flow:
    """A stream of jobs: those served, or those refused.

    Attributes:
        rate: Jobs per second.
        scv: Squared coefficient of variation of the gaps.
        peakedness: Variance over mean of the servers that the stream would keep busy if it
            were offered to an infinite number of them: 1 for Poisson, above 1 for bursts.
        is_poisson: Whether it is a Poisson process; None where that is not known.
    """

    rate: float
    scv: float | None = None
    peakedness: float | None = None
    is_poisson: bool | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SteadyState:
    """Long-run behaviour of a station. Times are seconds, rates per second.

    Waits and times in system are those of jobs that are admitted, zero waits among them.

    Attributes:
        model: What was computed.
        road: How: ``closed form``, ``numerical, error < 1e-10``, ``approximation``.
        error: How far an approximation can be trusted; None elsewhere.
        method: Name of the analysis, as ``method=`` takes it.
        source: Where the formula or algorithm is from.
        utilisation: Share of the servers that is busy in the mean; None where n is infinite.
        loss_probability: Share of the arrivals that is refused.
        probability_of_waiting: Share of those admitted that waits at all.
        throughput: Jobs per second that are served.
        mean_wait: From arrival to the start of service.
        mean_squared_wait: E[W²], in seconds².
        mean_time_in_system: From arrival to departure.
        mean_waiting: Jobs that wait, in the mean over time.
        mean_in_system: Jobs that wait or are served, in the mean over time.
        wait: The whole distribution of the wait.
        time_in_system: The whole distribution of the time in system.
        output: The flow of jobs that leave served.
        refusals: The flow of jobs that are refused; None where nobody ever is.
    """

    model: Model
    road: str
    method: str
    source: str
    utilisation: float | None
    loss_probability: float | None
    throughput: float
    probability_of_waiting: float | None = None
    mean_wait: float | None = None
    mean_squared_wait: float | None = None
    mean_time_in_system: float | None = None
    mean_waiting: float | None = None
    mean_in_system: float | None = None
    wait: TimeLaw | None = None
    time_in_system: TimeLaw | None = None
    output: Flow | None = None
    refusals: Flow | None = None
    error: str | None = None

    def wait_percentile(self, share: float) -> float | None:
        """Return the wait that ``share`` of the admitted jobs do not exceed, in seconds."""
        return None if self.wait is None else self.wait.percentile(share)

    def time_in_system_percentile(self, share: float) -> float | None:
        """Return the time in system that ``share`` do not exceed, in seconds."""
        return None if self.time_in_system is None else self.time_in_system.percentile(share)


def nothing_waits() -> Multiset:
    """Return the wait where there is no waiting room: always 0."""
    return Multiset((Fraction(0),))
