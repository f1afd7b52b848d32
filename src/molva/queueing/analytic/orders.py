"""Who is next: the wait where the last to come is served first, or where one is drawn by lot.

The order changes no mean, only the spread. A service is as long in any order, so the time in
system is the wait and an independent service.

Last come, first served: whoever has to wait is next when those are gone who come after him,
which is a busy period. Its transform solves a fixed-point equation and is inverted. Drawn by
lot: the wait is a mixture of exponentials that Flatto found, and of a bounded room the time
that a Markov chain takes, by its transform.
"""

import cmath
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from molva.queueing.analytic._inversion import tail_by_inversion, tail_of_array
from molva.queueing.analytic._residual import integral, residual_transform
from molva.queueing.analytic.mixtures import sojourn_tail
from molva.queueing.distributions import (
    Distribution,
    Erlang,
    Exponential,
    Hyperexponential,
    LogNormal,
    Uniform,
    as_deterministic,
)
from molva.queueing.result import (
    CLOSED_FORM,
    NUMERICAL,
    Shifted,
    SteadyState,
    Tail,
    TimeLaw,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]
    Complex = NDArray[np.complex128]

__all__ = [
    "Waits",
    "last_of_any_gaps",
    "last_of_any_service",
    "last_of_memoryless",
    "lot_of_memoryless",
    "lot_of_room",
    "mean_square",
    "ordered",
    "stack_of_room",
]

_SOURCES: Final = {
    "lifo": "last come, first served: a busy period, Takács (1962), Abate and Whitt (1995)",
    "random": "random order: Kingman (1962), Flatto (1997)",
}

Transform = Callable[[complex], complex]

# Waiting places beyond which the chain of a draw by lot takes more than a second.
_MOST_PLACES: Final = 1000

# Terms of the inversion where the edges of a uniform time put kinks into the second derivative.
_TERMS_OF_EDGES: Final = 400

# Services that the piecewise wait behind a constant service time is summed over, and nodes of
# Gauss-Legendre in each. More, and a percentile takes seconds: then none is given.
_MOST_PIECES: Final = 200_000
_NODES: Final = 10


@dataclass(frozen=True, slots=True)
class Waits:
    """What the order decides.

    Attributes:
        mean_squared_wait: E[W²], in seconds².
        wait: Of an admitted job.
        time_in_system: Of an admitted job.
    """

    mean_squared_wait: float | None = None
    wait: TimeLaw | None = None
    time_in_system: TimeLaw | None = None


def mean_square(order: str, first_come: float | None, rho: float) -> float | None:
    """Return E[W²] of M/G/1/inf or M/M/n/inf in ``order``, from that of first come.

    Source:
        Kingman, "The effect of queue discipline on waiting time variance" (1962); Takács (1963).
    """
    if first_come is None:
        return None
    return first_come * {"fifo": 1.0, "lifo": 1 / (1 - rho), "random": 2 / (2 - rho)}[order]


def ordered(state: SteadyState, waits: Waits) -> SteadyState:
    """Return ``state``, which is that of first come first served, with the waits of an order."""
    numerical = waits.wait is not None and state.road == CLOSED_FORM
    return replace(
        state,
        road=NUMERICAL if numerical else state.road,
        source=f"{state.source}; {_SOURCES[str(state.model.discipline)]}",
        mean_squared_wait=waits.mean_squared_wait,
        wait=waits.wait,
        time_in_system=waits.time_in_system,
    )


# Last come, first served.


def last_of_memoryless(
    arrival: float, service: float, n: int, waiting: float, squared: float
) -> Waits:
    """Return the waits of M/M/n/inf: a busy period of M/M/1 at the rate of all servers."""
    capacity = n * service

    def busy(s: complex) -> complex:
        total = arrival + capacity + s
        return 2 * capacity / (total + cmath.sqrt(total * total - 4 * arrival * capacity))

    law = Exponential(Fraction(1 / service))
    return _by_transform(busy, waiting, law, squared, 1 / capacity)


def last_of_any_service(
    arrival: float, service: Distribution, rho: float, squared: float | None
) -> Waits:
    """Return the waits of M/G/1/inf: a busy period that a residual service begins."""
    constant = as_deterministic(service)
    if constant is not None:
        pieces = _Pieces.of(rho)
        if pieces is None:
            return Waits(squared)
        time = float(constant.mean)
        wait = Tail(lambda t: pieces.tail(t / time), time)
        return Waits(squared, wait, Shifted(wait, time))
    if not _is_smooth(service) and not isinstance(service, Uniform):
        return Waits(squared)
    residual, root_of = residual_transform(service), _roots(service, arrival)

    def busy(s: complex) -> complex:
        return residual(s + arrival * (1 - root_of(s)))

    terms = _TERMS_OF_EDGES if isinstance(service, Uniform) else None
    return _by_transform(busy, rho, service, squared, float(service.mean), terms)


def last_of_any_gaps(
    gap: Distribution, service: float, n: int, waiting: float, drain: float
) -> Waits:
    """Return the waits of G/M/n/inf: a busy period of G/M/1 at the rate of all servers.

    First come first served, the wait of those who wait is exponential with the rate ``drain``.
    """
    capacity = n * service
    # d/ds of the gaps' transform at ``drain``, by a step so small that nothing cancels.
    tiny = drain * 1e-30
    value = gap.lst(complex(drain, tiny))
    assert value is not None
    slope = value.imag / tiny
    squared = 2 * waiting / (drain**2 * (1 + capacity * slope))
    if not _is_smooth(gap):
        return Waits(squared)
    root_of = _roots(gap, capacity)

    def busy(s: complex) -> complex:
        ends = capacity * (1 - root_of(s))
        return ends / (s + ends)

    return _by_transform(busy, waiting, Exponential(Fraction(1 / service)), squared, 1 / capacity)


def _roots(law: Distribution, rate: float) -> Callable[[complex], complex]:
    """Return z(s) of z = L(s + rate · (1 − z)), where L is the transform of the law."""
    root = 0j  # that of one s is near that of the next

    def root_of(s: complex) -> complex:
        nonlocal root

        def step(z: complex) -> complex:
            value = law.lst(s + rate * (1 - z))
            assert value is not None
            return value

        root = _fixed_point(step, root)
        return root

    return root_of


def stack_of_room(
    arrival: float, service: float, n: int, q: int, weight: Callable[[int], float], waiting: float
) -> Waits:
    """Return the waits of M/M/n/q, the last to come first served.

    A job that takes place m waits until the number waiting falls below m for the first time,
    while q − m places above it are left for others. ``weight`` is the share of the admitted that
    takes place m, 1 ≤ m ≤ q, and ``waiting`` the sum of these.
    """
    capacity = n * service
    first = second = total = 0.0
    for room in range(q):
        first = (1 + arrival * first) / capacity
        second = 2 * first * first + arrival / capacity * second
        total += weight(q - room) * second

    def falls(s: complex) -> complex:
        down = capacity / (capacity + s)
        mixed, done = weight(q) * down, weight(q)
        for room in range(1, q):
            before, down = down, capacity / (capacity + arrival + s - arrival * down)
            if abs(down - before) <= 1e-16 * abs(down):
                break  # so much room is as good as any
            share = weight(q - room)
            mixed, done = mixed + share * down, done + share
        return (mixed + (waiting - done) * down) / waiting

    squared = total if math.isfinite(total) else None
    return _by_transform(falls, waiting, Exponential(Fraction(1 / service)), squared, q / capacity)


def _is_smooth(law: Distribution) -> bool:
    return isinstance(law, Erlang | Exponential | Hyperexponential | LogNormal) and bool(law.scv)


def _fixed_point(step: Callable[[complex], complex], z: complex) -> complex:
    """Return z = step(z) in the unit disc, where there is one, by Steffensen's method from z."""
    for _ in range(500):
        once = step(z)
        if abs(once - z) <= 2e-16 * abs(once):
            return once
        twice = step(once)
        bend = twice - 2 * once + z
        leap = z - (once - z) ** 2 / bend if bend else twice
        z = leap if abs(leap) <= 1 else twice
    return z


def _by_transform(
    busy: Transform,
    waiting: float,
    service: Distribution,
    squared: float | None,
    scale: float,
    terms: int | None = None,
) -> Waits:
    """Return the waits of a job that waits with that probability, for a time of that transform."""
    residual, mean = residual_transform(service), float(service.mean)
    plain = {} if terms is None else {"plain": terms}

    def of_wait(s: complex) -> complex:
        return waiting * (1 - busy(s)) / s

    def of_sojourn(s: complex) -> complex:
        # (1 − W*B)/s, as (1 − W*)/s + W*(1 − B)/s.
        waits = waiting * (1 - busy(s))
        return waits / s + (1 - waits) * mean * residual(s)

    return Waits(
        squared,
        Tail(lambda t: tail_by_inversion(of_wait, t, **plain) if t > 0 else waiting, scale),
        Tail(lambda t: tail_by_inversion(of_sojourn, t, **plain) if t > 0 else 1.0, scale),
    )


class _Pieces:
    """The wait of M/D/1/inf, last come first served, in service times.

    Whoever comes x before the end of a service and waits t = x + j has j come after him who are
    served before him, with the probability (x/t) P(Poisson(ρt) = j) that they keep the server
    busy until then and no longer (Borel and Tanner).
    """

    def __init__(self, rho: float) -> None:
        self.rho = rho
        self.passed: list[float] = [0.0]  # P(0 < W ≤ j), j = 0, 1 …

    @classmethod
    def of(cls, rho: float) -> "_Pieces | None":
        # The tail falls like e^(−(ρ − 1 − ln ρ)t).
        decay = rho - 1 - math.log(rho)
        return cls(rho) if 30 / decay < _MOST_PIECES else None

    def tail(self, t: float) -> float:
        import numpy

        whole = math.floor(t)
        while len(self.passed) <= whole:
            count = max(64, len(self.passed))
            j = numpy.arange(float(len(self.passed) - 1), len(self.passed) - 1 + count)
            more = self.passed[-1] + numpy.cumsum(self._between(j, 0.0, 1.0))
            self.passed += more.tolist()
        left = self.rho - self.passed[whole]
        if t == whole:
            return left
        return left - float(self._between(numpy.array([float(whole)]), 0.0, t - whole)[0])

    def _between(self, j: "Vector", low: float, high: float) -> "Vector":
        """Return ρ ∫ (x/t) P(Poisson(ρt) = j) dx over t = j + x."""
        import numpy
        from scipy.special import gammaln

        x, w = numpy.polynomial.legendre.leggauss(_NODES)
        x = (low + high) / 2 + (high - low) / 2 * x
        t = j[:, None] + x[None, :]
        log_pmf = j[:, None] * numpy.log(self.rho * t) - self.rho * t - gammaln(j + 1)[:, None]
        result: Vector = self.rho * (high - low) / 2 * (numpy.exp(log_pmf) * x / t) @ w
        return result


# Drawn by lot.


def lot_of_memoryless(service: float, n: int, waiting: float, free: float, squared: float) -> Waits:
    """Return the waits of M/M/n/inf where the next is drawn by lot; ``free`` is 1 − ρ.

    Source:
        Flatto, "The waiting time distribution for the random order service M/M/1 queue", Annals
        of Applied Probability 7 (1997).
    """
    capacity = n * service
    root = math.sqrt(1 - free)
    less = free / (1 + root)  # 1 − √ρ

    def mixed(of_rate: Callable[[float], float]) -> float:
        """Return the mean of ``of_rate`` over the rates, in jobs per second, that are mixed."""

        def at(x: float) -> float:
            # x = tan(θ/2), so that what counts next to saturation is as wide as all else.
            below = 1 + x * x
            sine, cotangent = 2 * x / below, (1 - x * x) / (2 * x)
            theta = 2 * math.atan(x)
            phi = math.atan2(sine, less - 2 * x * x / below)
            rate = less * less + 4 * root * x * x / below
            power = (2 * phi - theta) * cotangent
            # e^power/(1 + e^(π cot θ)), of which neither part may overflow.
            if cotangent > 0:
                power -= math.pi * cotangent
            share = math.exp(power) / (1 + math.exp(-math.pi * abs(cotangent)))
            return share * sine / rate**2 * 2 / below * of_rate(capacity * rate)

        # Below θ² of the order of 1 − √ρ the share vanishes; from there on it falls.
        return 2 * free * integral(at, 0.0, math.inf, math.sqrt(less))

    return Waits(
        squared,
        Tail(lambda t: waiting * mixed(lambda rate: math.exp(-rate * t)), 1 / capacity),
        Tail(
            lambda t: (
                (1 - waiting) * math.exp(-service * t)
                + waiting * mixed(lambda rate: sojourn_tail(t, 1.0, rate, service))
            ),
            1 / service,
        ),
    )


def lot_of_room(
    arrival: float, service: float, n: int, q: int, weight: Callable[[int], float], waiting: float
) -> Waits:
    """Return the waits of M/M/n/q where the next is drawn by lot; see ``stack_of_room``."""
    if q > _MOST_PLACES:
        return Waits()
    import numpy
    from scipy.linalg import solve_banded

    # State j: j others wait. Each end of a service draws one of the j + 1.
    capacity = n * service
    others = numpy.arange(float(q))
    stay = capacity * others / (others + 1)
    up = numpy.where(others < q - 1, arrival, 0.0)
    start = numpy.array([weight(j + 1) for j in range(q)])
    bands = numpy.zeros((3, q))
    bands[0, 1:], bands[1], bands[2, :-1] = -up[:-1], capacity + up, -stay[1:]
    mean = solve_banded((1, 1), bands, numpy.ones(q))
    squared = float(start @ solve_banded((1, 1), bands, 2 * mean))

    def of_wait(s: "Complex") -> "Complex":
        # Elimination from below, at all s side by side; what is added is never subtracted.
        coefficient, constant = [], []
        above, right = numpy.zeros_like(s), numpy.zeros_like(s)
        for j in range(q):
            pivot = capacity + up[j] + s - stay[j] * above
            above, right = up[j] / pivot, (1 + stay[j] * right) / pivot
            coefficient.append(above)
            constant.append(right)
        total, here = numpy.zeros_like(s), numpy.zeros_like(s)
        for j in range(q - 1, -1, -1):
            here = constant[j] + coefficient[j] * here
            total = total + start[j] * here
        return total

    def of_sojourn(s: "Complex") -> "Complex":
        # With X(s) of the wait, whose transform is 1 − sX, that of the sum is (1 + μX)/(μ + s).
        result: Complex = (1 + service * of_wait(s)) / (service + s)
        return result

    return Waits(
        squared,
        Tail(lambda t: tail_of_array(of_wait, t) if t > 0 else waiting, 1 / capacity),
        Tail(lambda t: tail_of_array(of_sojourn, t) if t > 0 else 1.0, 1 / service),
    )
