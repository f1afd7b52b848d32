"""Periods of a sinusoidal arrival rate, and the chain M_t/M/n/q over one of them.

A period is like the last, or its amplitude and length are drawn anew. What a drawn period leaves
behind is then the mean over what is drawn, which is summed by Gauss's rule: all its periods are
integrated side by side, from one distribution to another, until the two are the same.
"""

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from molva.queueing.errors import NoAnalysisError
from molva.queueing.model import RandomRate, Sinusoid

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]
    States = NDArray[np.float64]

__all__ = ["Wave", "settled", "waves_of"]

# Periods that a drawn amplitude or length is summed over. Loss is a smooth function of both:
# with twice as many it changes by less than 1e-7 of itself where it is above 1e-6.
_NODES: Final = 8

# Periods until the solution repeats. A station remembers a few of its relaxation times; one
# that remembers more than these periods is refused.
_MOST_PERIODS: Final = 200
_REPEATS: Final = 1e-11


@dataclass(frozen=True, slots=True)
class Wave:
    """One period: the rate level + amplitude · sin(2πt/period + phase).

    Attributes:
        share: Probability that a period is like this.
        level: Jobs per second.
        amplitude: Jobs per second.
        period: Seconds.
        phase: Radians.
    """

    share: float
    level: float
    amplitude: float
    period: float
    phase: float

    def rate(self, part: float) -> float:
        """Return the jobs per second that arrive when ``part`` of the period is over."""
        turn = 2 * math.pi * part + self.phase
        return max(0.0, self.level + self.amplitude * math.sin(turn))


def waves_of(arrivals: Sinusoid) -> list[Wave]:
    """Return the periods that there are, or those that a draw is summed over."""
    return [
        Wave(share * other, float(arrivals.level), amplitude, period, float(arrivals.phase))
        for (share, amplitude), (other, period) in itertools.product(
            _drawn(arrivals.amplitude), _drawn(arrivals.period)
        )
    ]


def _drawn(number: Fraction | RandomRate) -> list[tuple[float, float]]:
    if isinstance(number, Fraction):
        return [(1.0, float(number))]
    import numpy

    x, w = numpy.polynomial.legendre.leggauss(_NODES)
    low, high = float(number.low), float(number.high)
    values = (low + high) / 2 + (high - low) / 2 * x
    return list(zip((w / 2).tolist(), values.tolist(), strict=True))


def settled(waves: list[Wave], mu: float, n: int, q: int, points: int, model: str) -> "States":
    """Return the probabilities of the states over each period.

    Args:
        waves: The periods.
        mu: Jobs per second that one server completes.
        n: Servers.
        q: Waiting places.
        points: Equal steps of a period.
        model: Its name, for an error.

    Returns:
        Shape ``(waves, points + 1, n + q + 1)``, the end of each period included.

    Raises:
        NoAnalysisError: It takes too many periods to settle.
    """
    import numpy
    from scipy.integrate import solve_ivp

    size = n + q + 1
    down = numpy.minimum(numpy.arange(size), n)[1:] * mu
    length = numpy.array([wave.period for wave in waves])[:, None]
    level = numpy.array([wave.level for wave in waves])[:, None]
    amplitude = numpy.array([wave.amplitude for wave in waves])[:, None]
    phase = waves[0].phase
    shares = numpy.array([wave.share for wave in waves])

    def forward(part: float, flat: "Vector") -> "Vector":
        p = flat.reshape(len(waves), size)
        rate = numpy.maximum(0.0, level + amplitude * math.sin(2 * math.pi * part + phase))
        up = (rate * p[:, :-1] - down * p[:, 1:]) * length
        change = numpy.zeros_like(p)
        change[:, :-1] -= up
        change[:, 1:] += up
        result: Vector = change.ravel()
        return result

    # From the station at the mean rate, which is the answer where periods are short.
    state = _at_mean_rate(float(level[0, 0]), mu, n, q)
    for _ in range(_MOST_PERIODS):
        solved = solve_ivp(
            forward,
            (0.0, 1.0),
            numpy.tile(state, len(waves)),
            method="LSODA",
            t_eval=numpy.linspace(0.0, 1.0, points + 1),
            rtol=1e-10,
            atol=1e-13,
            lband=1,
            uband=1,
        )
        if not solved.success:
            raise NoAnalysisError(f"{model} could not be integrated: {solved.message}")
        after = shares @ solved.y[:, -1].reshape(len(waves), size)
        after = after / after.sum()
        if numpy.abs(after - state).max() < _REPEATS:
            states: States = solved.y.reshape(len(waves), size, points + 1).transpose(0, 2, 1)
            return states
        state = after
    raise NoAnalysisError(
        f"{model} has not settled after {_MOST_PERIODS} periods: its period is too short beside "
        "the time that it takes to forget; take the mean rate"
    )


def _at_mean_rate(rate: float, mu: float, n: int, q: int) -> "Vector":
    import numpy

    busy = numpy.minimum(numpy.arange(1.0, n + q + 1), n)
    log_p = numpy.concatenate(([0.0], numpy.cumsum(numpy.log(rate / mu / busy))))
    p: Vector = numpy.exp(log_p - log_p.max())
    p /= p.sum()
    return p
