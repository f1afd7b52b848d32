"""M/D/n/inf, exactly: waits, numbers and every percentile.

Seen every D seconds, all that was in service has left, so the number X that waits follows
X' = (X + A − n)⁺ with a Poisson count A of arrivals. Its generating function is a factor of
1 − z⁻ⁿE[z^A] on the unit circle (Wiener and Hopf), and one fast Fourier transform of the
logarithm separates it. Crommelin's way, with n − 1 complex roots and a linear system in their
powers, loses all digits at n = 20; this one serves 10,000 servers.

The pole that is nearest to the circle is the geometric tail of X. It is divided out first and
multiplied back exactly, so heavy traffic costs nothing.
"""

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from molva.queueing.analytic import _poisson
from molva.queueing.analytic.constant_departures import departure_gap_scv
from molva.queueing.analytic.flows import output_of_single_server
from molva.queueing.analytic.orders import Waits, last_of_any_service, mean_square, ordered
from molva.queueing.distributions import as_deterministic, as_exponential
from molva.queueing.errors import NoAnalysisError, UnstableError
from molva.queueing.model import Model, Renewal
from molva.queueing.result import NUMERICAL, Flow, Shifted, SteadyState, Tail

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["METHOD", "applies", "pole_less_one", "solve"]

METHOD: Final = "crommelin"
_SOURCE: Final = (
    "Crommelin (1932) by Wiener-Hopf factorisation; wait: Franx, A simple solution for the "
    "M/D/c waiting time distribution (2001)"
)

# Points on the circle: as many as it takes for the Fourier series to end below _ENDED. The
# most are 64 MB an array, a second or two.
_FEWEST_POINTS: Final = 2**10
_MOST_POINTS: Final = 2**22
_ENDED: Final = 1e-14

# Share of the servers that is free, above which the unit circle is too close to the roots.
_LIGHT: Final = 0.65

# Angle times n below which differences are taken from their series.
_NEAR: Final = 1.0

# What is left of a probability when only rounding is.
_NOTHING: Final = 1e-16


def applies(model: Model) -> bool:
    """Whether arrivals are single and Poisson, service is constant and all can wait."""
    arrivals = model.arrivals
    return (
        model.servers is not None
        and model.waiting is None
        and as_deterministic(model.service) is not None
        and isinstance(arrivals, Renewal)
        and arrivals.batch == 1
        and as_exponential(arrivals.gap) is not None
    )


def solve(model: Model) -> SteadyState:
    """Return the steady state of M/D/n/inf.

    Raises:
        UnstableError: λ ≥ nμ.
    """
    n = model.servers
    constant = as_deterministic(model.service)
    assert n is not None
    assert constant is not None
    load = model.arrivals.rate * model.service.mean
    arrival, time = model.arrival_rate, float(constant.mean)
    if load >= n:
        raise UnstableError(str(model), arrival_rate=arrival, capacity=n / time)
    line = _Line(load, n)
    mean_wait = line.mean / arrival
    wait = Tail(lambda t: line.wait_tail(t / time), time)
    state = SteadyState(
        model=model,
        road=NUMERICAL,
        method=METHOD,
        source=_SOURCE,
        utilisation=float(load / n),
        loss_probability=0.0,
        probability_of_waiting=wait.tail(0.0),
        throughput=arrival,
        mean_wait=mean_wait,
        # Those who wait when a job begins came during its wait: E[X(X−1)] = λ²E[W²].
        mean_squared_wait=line.factorial / arrival**2,
        mean_time_in_system=mean_wait + time,
        mean_waiting=line.mean,
        mean_in_system=line.mean + float(load),
        wait=wait,
        time_in_system=Shifted(wait, time),
        output=output_of_single_server(arrival, 1.0, constant, mean_wait)
        if n == 1
        else Flow(arrival, departure_gap_scv(float(load), n, line.beyond), is_poisson=False),
    )
    if model.discipline == "fifo":
        return state
    if n > 1:
        return ordered(state, Waits())
    rho = float(load)
    squared = mean_square(model.discipline, state.mean_squared_wait, rho)
    if model.discipline == "lifo":
        return ordered(state, last_of_any_service(arrival, constant, rho, squared))
    return ordered(state, Waits(squared))


class _Line:
    """The number X that waits, at any time. Its tail ends in a geometric one of ratio β.

    Attributes:
        mean: E[X].
        factorial: E[X(X−1)].
    """

    def __init__(self, load: Fraction, n: int) -> None:
        self.load, self.n = float(load), n
        free = float((n - load) / n)
        excess = pole_less_one(free)
        self.ratio = 1 / (1 + excess)
        series = _series(self.load, n, free, excess)
        self._set_tail(series)
        # Sums of tails, the geometric end of them in closed form: nothing cancels.
        last, end = len(self.tail) - 1, self.tail[-1]
        self.mean = math.fsum(self.tail) + end / excess
        self.factorial = 2 * math.fsum(x * tail for x, tail in enumerate(self.tail))
        self.factorial += 2 * end * (last / excess + (1 + excess) / excess**2)

    def _set_tail(self, series: "NDArray[np.float64]") -> None:
        """Set P(X > x) up to where only the geometric tail is left."""
        import numpy

        # X less its geometric part can reach some n further than the series of its logarithm.
        points = 4 * (len(series) + self.n + 64)
        padded = numpy.zeros(points)
        padded[1 : len(series) + 1] = series
        rest = numpy.fft.ifft(numpy.exp(series.sum() - numpy.fft.fft(padded))).real
        counted = numpy.flatnonzero(numpy.abs(rest[: points // 2]) > _NOTHING)
        rest = rest[: counted[-1] + 1]
        # X is a geometric count and ``rest``, so P(X > x) is P(rest > x) and the sum of
        # P(rest = i) βˣ⁻ⁱ⁺¹ over i ≤ x. From the far end, so that small tails keep their digits.
        beyond = numpy.cumsum(rest[::-1])[::-1] - rest
        self.tail: list[float] = []
        geometric = 0.0
        for probability, further in zip(rest.tolist(), beyond.tolist(), strict=True):
            geometric = self.ratio * (geometric + probability)
            self.tail.append(max(0.0, geometric + further))

    def beyond(self, x: int) -> float:
        """Return P(X > x)."""
        if x < 0:
            return 1.0
        if x < len(self.tail):
            return self.tail[x]
        return self.tail[-1] * self.ratio ** (x - len(self.tail) + 1)

    def wait_tail(self, x: float) -> float:
        """Return P(W > xD): more are before the job than can begin by then."""
        k = math.floor(x) + 1
        limit = k * self.n - 1
        return _poisson.expectation(
            self.load * (k - x), lambda arrived: self.beyond(limit - arrived)
        )


def pole_less_one(free: float) -> float:
    """Return u > 0 with ln(1+u) = ρu, that is (u − ln(1+u))/u = 1 − ρ."""

    def share(u: float) -> float:
        if u < 1e-3:
            return math.fsum(-((-u) ** k) / (k + 1) for k in range(1, 8))
        return 1 - math.log1p(u) / u

    low, high = 0.0, 1.0
    while share(high) < free:
        low, high = high, 2 * high
    while high - low > 2e-16 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if share(middle) < free:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _series(load: float, n: int, free: float, excess: float) -> "NDArray[np.float64]":
    """Return c_k, k ≥ 1, with E[z^X] = (1−β)/(1−βz) exp(Σ c_k (1 − z^k))."""
    import numpy

    ratio = 1 / (1 + excess)
    if free > _LIGHT:
        return _series_when_light(load, n, ratio)
    points = max(_FEWEST_POINTS, 1 << (8 * n).bit_length())
    while points <= _MOST_POINTS:
        step = 2 * math.pi / points
        index = numpy.arange(1, points)
        angle = step * _centred(index, points)
        # z − 1 = −turn + i sin, and so on: written so that nothing cancels near z = 1.
        turn, sine = 2 * numpy.sin(angle / 2) ** 2, numpy.sin(angle)
        turned = load * sine - step * _centred(index * n, points)
        near = numpy.abs(angle) < _NEAR / n
        turned[near] = -load * _less_sine(angle[near]) - n * free * angle[near]
        value = -numpy.expm1(-load * turn + 1j * turned)
        value /= (turn + 1j * sine) * (ratio * (excess + turn - 1j * sine))
        at_one = free * n / (ratio * excess)
        value = numpy.concatenate(([at_one], value))
        # The logarithm must be continuous around the circle: its argument does not wind.
        logarithm = numpy.log(numpy.abs(value)) + 1j * numpy.unwrap(numpy.angle(value))
        series = numpy.fft.fft(logarithm).real / points
        middle = numpy.abs(series[points // 2 - 8 : points // 2 + 8]).max()
        if middle < _ENDED:
            # What follows the last coefficient that counts is rounding, and would be weighted
            # with its index.
            counted = numpy.flatnonzero(numpy.abs(series[1 : points // 2]) > 4 * middle)
            result: NDArray[np.float64] = series[1 : counted[-1] + 2 if len(counted) else 2]
            return result
        points *= 4
    raise NoAnalysisError(f"{n} servers at this load need more than {_MOST_POINTS} points")


def _series_when_light(load: float, n: int, ratio: float) -> "NDArray[np.float64]":
    """Return the same, from the circle of radius 1/ρ, where |z⁻ⁿE[z^A]| is smallest.

    With little load n roots crowd next to the unit circle, and its Fourier series hardly ends.
    """
    import numpy

    radius = n / load
    points = max(_FEWEST_POINTS, 1 << (8 * n).bit_length())
    angle = (2 * math.pi / points) * numpy.arange(points)
    exponent = load * (radius * numpy.exp(1j * angle) - 1) - 1j * n * angle
    small = numpy.exp(exponent - n * math.log(radius))
    coefficients = numpy.fft.fft(numpy.log1p(-small)).real[1 : points // 2] / points
    k = numpy.arange(1.0, points // 2)
    with_pole: NDArray[np.float64] = coefficients * radius**-k + ratio**k / k
    return with_pole


def _centred(index: "NDArray[np.int64]", points: int) -> "NDArray[np.int64]":
    """Return ``index`` modulo ``points``, between −points/2 and points/2."""
    result: NDArray[np.int64] = (index + points // 2) % points - points // 2
    return result


def _less_sine(x: "NDArray[np.float64]") -> "NDArray[np.float64]":
    """Return x − sin x for |x| ≤ 1, where the difference cancels."""
    x2 = x * x
    total = 1 - x2 / 272
    for k in (210, 156, 110, 72, 42, 20):
        total = 1 - x2 / k * total
    result: NDArray[np.float64] = x * x2 / 6 * total
    return result
