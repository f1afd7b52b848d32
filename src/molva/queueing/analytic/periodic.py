"""M_t/M/inf and M_t/M/n/q: Poisson arrivals whose rate rises and falls as a sinusoid.

There is no steady state but a periodic one. Its means are over a period, weighted as an
arrival sees them, because a peak refuses the many: the stationary formula at the mean rate
is wrong by an order of magnitude where peaks fill the station.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from molva.queueing.analytic import _poisson
from molva.queueing.distributions import as_exponential
from molva.queueing.errors import NoAnalysisError
from molva.queueing.model import Model, Sinusoid
from molva.queueing.result import CLOSED_FORM, Flow, SteadyState, Tail, nothing_waits

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]

__all__ = ["METHOD", "Course", "applies", "course", "solve"]

METHOD: Final = "periodic"
_INFINITE: Final = "Eick, Massey and Whitt, The physics of the Mt/G/inf queue (1993)"
_FORWARD: Final = "Kolmogorov's forward equations, integrated to their periodic solution"
_ROAD: Final = "numerical, error < 1e-8"

# Points of a period. Sums over equal steps of a smooth periodic function converge faster than
# any power of the step, so these do for a peak a hundredth of the period wide.
_POINTS: Final = 1024

# Periods until the solution repeats. A station remembers a few of its relaxation times; one
# that remembers more than these periods is refused.
_MOST_PERIODS: Final = 100
_REPEATS: Final = 1e-11

# States beyond which a period takes more than some seconds.
_MOST_STATES: Final = 2000


@dataclass(frozen=True, slots=True)
class Course:
    """How a station fares in the course of one period, at equal steps from its start.

    Attributes:
        times: Seconds.
        arrival_rate: Jobs per second that arrive.
        mean_in_system: Jobs that wait or are served.
        loss_probability: Probability that an arrival at that time is refused.
    """

    times: tuple[float, ...]
    arrival_rate: tuple[float, ...]
    mean_in_system: tuple[float, ...]
    loss_probability: tuple[float, ...]


def applies(model: Model) -> bool:
    """Whether arrivals follow one sinusoid and service is exponential."""
    arrivals = model.arrivals
    if not isinstance(arrivals, Sinusoid) or arrivals.is_random:
        return False
    if as_exponential(model.service) is None:
        return False
    if model.servers is None:
        return True
    return model.waiting is not None and model.servers + model.waiting <= _MOST_STATES


def solve(model: Model) -> SteadyState:
    """Return the means over a period.

    Raises:
        NoAnalysisError: The station takes too many periods to settle.
    """
    if model.servers is None:
        return _infinite(model)
    import numpy

    n, q = model.servers, model.waiting
    assert q is not None
    times, states = _periodic(model, n, q)
    rates = numpy.array([_rate(model, t) for t in times])
    # What an arrival sees: states weighted with the rate at which arrivals come.
    seen = rates @ states / rates.sum()
    mean = states.mean(axis=0)
    number = numpy.arange(n + q + 1)
    arrival, mu = model.arrival_rate, model.service_rate
    loss = float(seen[-1])
    throughput = arrival * (1 - loss)
    waiting = float(mean @ numpy.maximum(number - n, 0))
    in_system = float(mean @ number)
    places = (seen[n:-1] / (1 - loss)).tolist()
    beyond = [*numpy.cumsum(places[::-1])[::-1].tolist(), 0.0]
    fifo = model.discipline == "fifo"
    squares = sum(p * (m + 1) * (m + 2) for m, p in enumerate(places)) / (n * mu) ** 2
    wait = Tail(
        lambda t: _poisson.expectation(n * mu * t, lambda i: beyond[min(i, len(places))]),
        1 / (n * mu),
    )
    return SteadyState(
        model=model,
        road=_ROAD,
        method=METHOD,
        source=_FORWARD,
        utilisation=(in_system - waiting) / n,
        loss_probability=loss,
        probability_of_waiting=sum(places),
        throughput=throughput,
        mean_wait=waiting / throughput,
        mean_squared_wait=squares if fifo else None,
        mean_time_in_system=in_system / throughput,
        mean_waiting=waiting,
        mean_in_system=in_system,
        wait=(wait if q else nothing_waits()) if fifo else None,
        time_in_system=_sojourn(places, beyond, n, mu) if fifo else None,
        output=Flow(throughput, is_poisson=False),
        refusals=Flow(arrival * loss, is_poisson=False),
    )


def _sojourn(places: list[float], beyond: list[float], n: int, mu: float) -> Tail:
    """Return the time in system where place m, from 1, is taken with probability places[m−1].

    A job is there after i departures if it still waits, or began at the m-th and was none of
    the i − m since, each with the probability (n−1)/n; see ``birth_death``.
    """
    stay = (n - 1) / n
    held = [0.0]
    for probability in places:
        held.append(held[-1] * stay + probability)
    last = len(places)

    def present(i: int) -> float:
        if i <= last:
            return beyond[i] + held[i]
        return held[last] * stay ** (i - last)

    straight = 1 - sum(places)
    return Tail(
        lambda t: straight * math.exp(-mu * t) + _poisson.expectation(n * mu * t, present), 1 / mu
    )


def _infinite(model: Model) -> SteadyState:
    mean = float(model.service.mean)
    return SteadyState(
        model=model,
        road=CLOSED_FORM,
        method=METHOD,
        source=_INFINITE,
        utilisation=None,
        loss_probability=0.0,
        probability_of_waiting=0.0,
        throughput=model.arrival_rate,
        mean_wait=0.0,
        mean_squared_wait=0.0,
        mean_time_in_system=mean,
        mean_waiting=0.0,
        mean_in_system=model.offered_load,
        wait=nothing_waits(),
        time_in_system=Tail(lambda t: math.exp(-t / mean), mean),
        output=Flow(model.arrival_rate),
    )


def course(model: Model, points: int = 96) -> Course:
    """Return how the station fares over a period, at ``points`` equal steps.

    Example:
        The number present peaks after the rate does.

        >>> day = course(Model.parse("sin(level=10/h,amplitude=5/h,period=24h)/M(1h)/inf"))
        >>> round(max(day.mean_in_system), 2)
        14.84
    """
    if not applies(model):
        raise NoAnalysisError(f"a course is that of M_t/M/inf or M_t/M/n/q, not of {model}")
    period = _period(model)
    times = tuple(period * i / points for i in range(points))
    rates = tuple(_rate(model, t) for t in times)
    if model.servers is None:
        number = tuple(_infinite_at(model, t) for t in times)
        return Course(times, rates, number, (0.0,) * points)
    import numpy

    assert model.waiting is not None
    _, states = _periodic(model, model.servers, model.waiting, points)
    means = states @ numpy.arange(states.shape[1])
    return Course(times, rates, tuple(means.tolist()), tuple(states[:, -1].tolist()))


def _sinusoid(model: Model) -> Sinusoid:
    assert isinstance(model.arrivals, Sinusoid)
    return model.arrivals


def _period(model: Model) -> float:
    period = _sinusoid(model).period
    assert isinstance(period, Fraction)
    return float(period)


def _rate(model: Model, t: float) -> float:
    wave = _sinusoid(model)
    assert isinstance(wave.amplitude, Fraction)
    turn = 2 * math.pi * t / _period(model) + float(wave.phase)
    return max(0.0, float(wave.level) + float(wave.amplitude) * math.sin(turn))


def _infinite_at(model: Model, t: float) -> float:
    """Return the mean number present in M_t/M/inf at t, which lags behind the rate."""
    wave, mu = _sinusoid(model), model.service_rate
    assert isinstance(wave.amplitude, Fraction)
    w = 2 * math.pi / _period(model)
    turn = w * t + float(wave.phase)
    swing = (mu * math.sin(turn) - w * math.cos(turn)) / (mu * mu + w * w)
    return float(wave.level) / mu + float(wave.amplitude) * swing


def _periodic(model: Model, n: int, q: int, points: int = _POINTS) -> tuple[list[float], "Matrix"]:
    """Return times and, a row each, the probabilities of the states at them."""
    import numpy
    from scipy.integrate import solve_ivp

    period, mu = _period(model), model.service_rate
    down = numpy.minimum(numpy.arange(n + q + 1), n) * mu

    def forward(t: float, p: "Matrix") -> "Matrix":
        up = _rate(model, t) * p[:-1] - down[1:] * p[1:]
        change: Matrix = numpy.zeros_like(p)
        change[:-1] -= up
        change[1:] += up
        return change

    times = [period * i / points for i in range(points)]
    state = numpy.zeros(n + q + 1)
    state[0] = 1.0
    for _ in range(_MOST_PERIODS):
        solved = solve_ivp(
            forward,
            (0.0, period),
            state,
            method="LSODA",
            t_eval=[*times, period],
            rtol=1e-10,
            atol=1e-13,
            lband=1,
            uband=1,
        )
        if not solved.success:
            raise NoAnalysisError(f"{model} could not be integrated: {solved.message}")
        after = solved.y[:, -1] / solved.y[:, -1].sum()
        if numpy.abs(after - state).max() < _REPEATS:
            return times, solved.y[:, :-1].T
        state = after
    raise NoAnalysisError(
        f"{model} has not settled after {_MOST_PERIODS} periods: its period is too short beside "
        "its service times"
    )
