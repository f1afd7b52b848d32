"""Times drawn from the distributions of a model, into arrays, in units of its clock.

All numbers come from numpy, also where a compiled kernel uses them: so a run has the same
numbers with and without the compiler. Drawing in one piece or in several gives the same
times, so a longer run begins like a shorter one.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from molva.queueing.distributions import (
    Distribution,
    Erlang,
    Exponential,
    General,
    Hyperexponential,
    LogNormal,
    Trace,
    Uniform,
    as_deterministic,
)
from molva.queueing.simulate.units import Clock

__all__ = ["Fill", "Floats", "fill_of"]

Floats = NDArray[np.float64]

# Writes independent times over all of an array.
Fill = Callable[[Floats], None]

# Phases of an Erlang time up to which a sum of exponentials is cheaper than a gamma variate.
_MOST_SUMMED: Final = 4


def fill_of(law: Distribution, clock: Clock, generators: list[np.random.Generator]) -> Fill:
    """Return what draws from ``law`` in units of ``clock``."""
    first, second, *_ = generators
    mean = clock.units(law.mean)
    fixed = as_deterministic(law)
    if fixed is not None:
        return partial(_constant, mean)
    match law:
        case Exponential():
            return partial(_exponential, first, mean)
        case Erlang(phases=phases) if phases <= _MOST_SUMMED:
            return partial(_erlang, first, phases, mean / phases)
        case Erlang(phases=phases):
            return partial(_gamma, first, float(phases), mean / phases)
        case Hyperexponential():
            (often, short), (_, long) = law.branches
            unit = float(clock.unit)
            return partial(_either, first, second, often, short / unit, long / unit)
        case LogNormal():
            centre = math.log(mean) - law.sigma**2 / 2
            return partial(_lognormal, first, centre, law.sigma)
        case Uniform():
            low, high = clock.units(law.low), clock.units(law.high)
            return partial(_uniform, first, low, high - low)
        case General():
            scv = float(law.scv)
            return partial(_gamma, first, 1 / scv, mean * scv)
        case Trace():
            times = clock.round(law.values)
            return partial(_picked, first, times)
    raise TypeError(f"no times are drawn from {law}")


def _constant(time: float, out: Floats) -> None:
    out.fill(time)


def _exponential(generator: np.random.Generator, mean: float, out: Floats) -> None:
    generator.standard_exponential(out=out)
    if mean != 1.0:
        out *= mean


def _erlang(generator: np.random.Generator, phases: int, mean: float, out: Floats) -> None:
    parts = generator.standard_exponential((out.size, phases))
    out[:] = parts[:, 0]
    for phase in range(1, phases):
        out += parts[:, phase]
    out *= mean


def _gamma(generator: np.random.Generator, shape: float, scale: float, out: Floats) -> None:
    generator.standard_gamma(shape, out=out)
    out *= scale


def _either(
    generator: np.random.Generator,
    branch: np.random.Generator,
    often: float,
    short: float,
    long: float,
    out: Floats,
) -> None:
    generator.standard_exponential(out=out)
    out *= np.where(branch.random(out.size) < often, short, long)


def _lognormal(generator: np.random.Generator, centre: float, sigma: float, out: Floats) -> None:
    # The exponential of a whole array takes a third of the time of numpy's own log-normal.
    generator.standard_normal(out=out)
    out *= sigma
    out += centre
    np.exp(out, out=out)


def _uniform(generator: np.random.Generator, low: float, width: float, out: Floats) -> None:
    generator.random(out=out)
    out *= width
    if low:
        out += low


def _picked(generator: np.random.Generator, times: Floats, out: Floats) -> None:
    # Not integers(): it draws a varying number of words, but one uniform is one time.
    np.take(times, (generator.random(out.size) * times.size).astype(np.intp), out=out)
