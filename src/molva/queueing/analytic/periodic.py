"""M_t/M/inf and M_t/M/n/q: Poisson arrivals whose rate rises and falls as a sinusoid.

There is no steady state but a periodic one. Its means are over a period, weighted as an
arrival sees them, because a peak refuses the many: the stationary formula at the mean rate
is wrong by an order of magnitude where peaks fill the station.
"""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Final

from molva.queueing.analytic import insensitive
from molva.queueing.analytic.places import Places
from molva.queueing.analytic.waves import settled, waves_of
from molva.queueing.distributions import as_exponential
from molva.queueing.errors import NoAnalysisError, UnstableError
from molva.queueing.model import Model, Sinusoid
from molva.queueing.result import Flow, SteadyState, nothing_waits

__all__ = ["METHOD", "Course", "applies", "course", "solve"]

METHOD: Final = "periodic"
_INFINITE: Final = "Eick, Massey and Whitt, The physics of the Mt/G/inf queue (1993)"
_FORWARD: Final = "Kolmogorov's forward equations, integrated to their periodic solution"
_ROAD: Final = "numerical, error < 1e-8"
_ROAD_OF_DRAWN: Final = "numerical, error < 1e-6"

# Points of a period, an even number. Sums over equal steps of a smooth periodic function converge
# faster than any power of the step, so these do for a peak a hundredth of the period wide.
_POINTS: Final = 1024

# Loss at which a room is taken for one that is never full.
_NEXT_TO_NOTHING: Final = 1e-12

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
    """Whether arrivals follow a sinusoid and service is exponential."""
    if not isinstance(model.arrivals, Sinusoid) or as_exponential(model.service) is None:
        return False
    return model.servers is None or model.servers + (model.waiting or 0) <= _MOST_STATES


def solve(model: Model) -> SteadyState:
    """Return the means over a period.

    Raises:
        UnstableError: All can wait, and the mean rate is λ ≥ nμ.
        NoAnalysisError: The station takes too many periods to settle, or too many jobs wait.
    """
    if model.servers is None:
        return _infinite(model)
    if model.waiting is not None:
        return _bounded(model, model.servers, model.waiting)
    state, _ = _never_full(model, model.servers)
    return replace(state, model=model, loss_probability=0.0, refusals=None)


def _never_full(model: Model, n: int) -> tuple[SteadyState, int]:
    """Return the means where all can wait, and places enough that next to nothing is refused."""
    a = model.offered_load
    if model.arrivals.rate * model.service.mean >= n:
        raise UnstableError(
            str(model), arrival_rate=model.arrival_rate, capacity=n * model.service_rate
        )
    # So much room that next to nothing is refused is as good as any.
    q = math.ceil(_backlog(model, n) + 12 * math.sqrt(n) + 40 / math.log(n / a))
    while n + q <= _MOST_STATES:
        state = _bounded(model, n, q)
        if (state.loss_probability or 0.0) < _NEXT_TO_NOTHING:
            return state, q
        q *= 2
    raise NoAnalysisError(
        f"more than {_MOST_STATES} jobs would have to be followed in {model}; give it waiting "
        "places, or less load"
    )


def _backlog(model: Model, n: int) -> float:
    """Return the jobs that pile up while more arrive than are served, at most."""
    capacity = n * model.service_rate
    most = 0.0
    for wave in waves_of(_sinusoid(model)):
        line = [0.0]
        for i in range(400):
            line.append(max(0.0, line[-1] + (wave.rate(i / 200) - capacity) * wave.period / 200))
        most = max(most, *line)
    return most


def _bounded(model: Model, n: int, q: int) -> SteadyState:
    import numpy

    waves, mu, arrival = waves_of(_sinusoid(model)), model.service_rate, model.arrival_rate
    states = settled(waves, mu, n, q, _POINTS, str(model))
    rates = numpy.array([[wave.rate(i / _POINTS) for i in range(_POINTS + 1)] for wave in waves])
    # Simpson's rule over each period; long periods count for more.
    simpson = numpy.array([1.0, *([4.0, 2.0] * (_POINTS // 2))[:-1], 1.0]) / (3 * _POINTS)
    lengths = numpy.array([wave.share * wave.period for wave in waves])
    lengths /= lengths.sum()
    mean = numpy.einsum("w,p,wpk->k", lengths, simpson, states)
    # What an arrival sees: states weighted with the rate at which arrivals come.
    seen = numpy.einsum("w,p,wp,wpk->k", lengths, simpson, rates, states)
    seen /= seen.sum()
    number = numpy.arange(n + q + 1)
    loss = max(0.0, float(seen[-1]))
    throughput = arrival * (1 - loss)
    waiting = float(mean @ numpy.maximum(number - n, 0))
    in_system = float(mean @ number)
    found = (seen / (1 - loss)).tolist()
    places = Places(n, mu, sum(found[:n]), found[n:-1])
    fifo = model.discipline == "fifo" or q == 0
    return SteadyState(
        model=model,
        road=_ROAD if len(waves) == 1 else _ROAD_OF_DRAWN,
        method=METHOD,
        source=_FORWARD,
        utilisation=(in_system - waiting) / n,
        loss_probability=loss,
        probability_of_waiting=places.beyond(0),
        throughput=throughput,
        mean_wait=waiting / throughput,
        mean_squared_wait=places.squared() if fifo else None,
        mean_time_in_system=in_system / throughput,
        mean_waiting=waiting,
        mean_in_system=in_system,
        wait=(places.wait() if q else nothing_waits()) if fifo else None,
        time_in_system=places.time_in_system() if fifo else None,
        output=Flow(throughput, is_poisson=False),
        refusals=Flow(arrival * loss, is_poisson=False),
    )


def _infinite(model: Model) -> SteadyState:
    return replace(insensitive.solve(model), method=METHOD, source=_INFINITE)


def course(model: Model, points: int = 96) -> Course:
    """Return how the station fares over a period, at ``points`` equal steps.

    Example:
        The number present peaks after the rate does.

        >>> day = course(Model.parse("sin(level=10/h,amplitude=5/h,period=24h)/M(1h)/inf"))
        >>> round(max(day.mean_in_system), 2)
        14.84
    """
    drawn = isinstance(model.arrivals, Sinusoid) and model.arrivals.is_random
    if not applies(model) or drawn:
        raise NoAnalysisError(
            "a course is that of M_t/M/inf or M_t/M/n/q, all of whose periods are alike, not of "
            f"{model}"
        )
    period = _period(model)
    times = tuple(period * i / points for i in range(points))
    rates = tuple(_rate(model, t) for t in times)
    if model.servers is None:
        number = tuple(_infinite_at(model, t) for t in times)
        return Course(times, rates, number, (0.0,) * points)
    import numpy

    room = model.waiting
    if room is None:
        _, room = _never_full(model, model.servers)
    waves = waves_of(_sinusoid(model))
    [states] = settled(waves, model.service_rate, model.servers, room, points, str(model))
    states = states[:-1]
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
