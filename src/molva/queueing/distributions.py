"""Distributions of a time: what the letters M, D, E, H2, LN, U, G and ``trace`` stand for.

Each knows its mean as an exact fraction of a second, its squared coefficient of variation
(scv), moments, distribution function and Laplace transform, and draws samples from a
generator that is passed in. numpy is loaded when it is first needed, so that reading a
model costs nothing.

Adding one here? Also ``notation.py``, and the table in ``docs/queueing.md``.
"""

import cmath
import itertools
import math
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, final

from molva.queueing.errors import MissingLibraryError, ParameterError, TraceError
from molva.queueing.quantities import LARGEST, UNITS, Form, number_text, rate_text, time_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Samples = NDArray[np.float64]

__all__ = [
    "Deterministic",
    "Distribution",
    "Erlang",
    "Exponential",
    "General",
    "Hyperexponential",
    "LogNormal",
    "Trace",
    "Uniform",
    "as_deterministic",
    "as_exponential",
]


# Phases of an Erlang time: its transform is a sum over them, and its scv is then 1e-4.
_MOST_PHASES: Final = 10_000


class Distribution(Protocol):
    """A distribution of a non-negative time, in seconds."""

    @property
    def mean(self) -> Fraction:
        """Mean, exact."""

    @property
    def scv(self) -> Fraction:
        """Variance divided by the squared mean: 0 for a constant, 1 for an exponential."""

    def moment(self, order: int) -> float | None:
        """Return E[T^order] in seconds^order; None where it is not determined."""

    def cdf(self, t: float) -> float | None:
        """Return P(T ≤ t); None where it is not determined."""

    def lst(self, s: complex) -> complex | None:
        """Return E[exp(−sT)]; None where it is not determined.

        Defined for Re s ≥ 0, and to the left of it as far as the expectation exists.
        """

    def sample(self, generator: "np.random.Generator", size: int) -> "Samples":
        """Draw ``size`` independent times. The generator alone decides which."""


def _require_positive(name: str, value: Fraction) -> None:
    if value <= 0:
        raise ParameterError(f"{name} must be above 0; it is {time_text(value)}")
    if not 1 / LARGEST <= value <= LARGEST:
        raise ParameterError(f"{name} lies between 1e-60 s and 1e60 s")


def _require_scv(scv: Fraction) -> None:
    if scv < 0:
        raise ParameterError(f"an scv is at least 0; it is {number_text(scv)}")
    if scv > LARGEST:
        raise ParameterError("an scv is at most 1e60")


def _mean_text(mean: Fraction, form: Form) -> str:
    return rate_text(1 / mean) if form == "rate" else time_text(mean)


@final
@dataclass(frozen=True, slots=True)
class Exponential:
    """M: exponential, without memory.

    Attributes:
        mean: Seconds, above 0.
        form: How the mean is printed: as a time, or as a rate.
    """

    mean: Fraction
    form: Form = field(default="time", compare=False)

    def __post_init__(self) -> None:
        _require_positive("a mean time", self.mean)

    @property
    def scv(self) -> Fraction:
        return Fraction(1)

    def moment(self, order: int) -> float:
        return math.factorial(order) * float(self.mean) ** order

    def cdf(self, t: float) -> float:
        return -math.expm1(-t / float(self.mean)) if t > 0 else 0.0

    def lst(self, s: complex) -> complex:
        return 1 / (1 + s * float(self.mean))

    def sample(self, generator: "np.random.Generator", size: int) -> "Samples":
        return generator.standard_exponential(size) * float(self.mean)

    def __str__(self) -> str:
        return f"M({_mean_text(self.mean, self.form)})"


@final
@dataclass(frozen=True, slots=True)
class Deterministic:
    """D: always the same time, an exact fraction of a second.

    Attributes:
        mean: The time in seconds, above 0.
        form: How it is printed: as a time, or as a rate.
    """

    mean: Fraction
    form: Form = field(default="time", compare=False)

    def __post_init__(self) -> None:
        _require_positive("a time", self.mean)

    @property
    def scv(self) -> Fraction:
        return Fraction(0)

    def moment(self, order: int) -> float:
        return float(self.mean) ** order

    def cdf(self, t: float) -> float:
        return 1.0 if t >= float(self.mean) else 0.0

    def lst(self, s: complex) -> complex:
        return cmath.exp(-s * float(self.mean))

    def sample(self, generator: "np.random.Generator", size: int) -> "Samples":
        times: Samples = _numpy().full(size, float(self.mean))
        return times

    def __str__(self) -> str:
        return f"D({_mean_text(self.mean, self.form)})"


@final
@dataclass(frozen=True, slots=True)
class Erlang:
    """E: the sum of ``phases`` exponential times of one mean, scv 1/phases.

    Attributes:
        phases: At least 1.
        mean: Of the sum, in seconds, above 0.
        form: How the mean is printed: as a time, or as a rate.
    """

    phases: int
    mean: Fraction
    form: Form = field(default="time", compare=False)

    def __post_init__(self) -> None:
        _require_positive("a mean time", self.mean)
        if self.phases < 1:
            raise ParameterError(f"E needs at least 1 phase, as in E2; it has {self.phases}")
        if self.phases > _MOST_PHASES:
            raise ParameterError(
                f"E has at most {_MOST_PHASES} phases, not {self.phases}; beyond, write D"
            )

    @property
    def scv(self) -> Fraction:
        return Fraction(1, self.phases)

    def moment(self, order: int) -> float:
        rising = math.prod(range(self.phases, self.phases + order))
        return rising * (float(self.mean) / self.phases) ** order

    def cdf(self, t: float) -> float:
        if t <= 0:
            return 0.0
        # P(Poisson(x) ≥ phases): as many events of one phase's rate have come by t.
        x = t * self.phases / float(self.mean)
        below = math.fsum(
            math.exp(k * math.log(x) - x - math.lgamma(k + 1)) for k in range(self.phases)
        )
        return max(0.0, 1.0 - below)

    def lst(self, s: complex) -> complex:
        return (1 + s * (float(self.mean) / self.phases)) ** -self.phases

    def sample(self, generator: "np.random.Generator", size: int) -> "Samples":
        return generator.standard_gamma(self.phases, size) * (float(self.mean) / self.phases)

    def __str__(self) -> str:
        return f"E{self.phases}({_mean_text(self.mean, self.form)})"


@final
@dataclass(frozen=True, slots=True)
class Hyperexponential:
    """H2: one of two exponential times, drawn by lot, with balanced means.

    Balanced means fix the third free number: each of the two kinds of job brings the same
    work, p₁m₁ = p₂m₂.

    Attributes:
        mean: Seconds, above 0.
        scv: At least 1: mixing exponentials can only add variation.
    """

    mean: Fraction
    scv: Fraction

    def __post_init__(self) -> None:
        _require_positive("a mean time", self.mean)
        if self.scv < 1:
            raise ParameterError(
                f"no H2 has scv {number_text(self.scv)}: it is at least 1; below, take E, LN or U"
            )
        _require_scv(self.scv)

    @property
    def branches(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Probability and mean of each of the two exponentials, the likelier first."""
        c, mean = float(self.scv), float(self.mean)
        root = math.sqrt((c - 1) / (c + 1))
        # 1 − root, without losing the digits of a rare, long branch to cancellation.
        rare = (2 / (c + 1)) / (1 + root) / 2
        often = 1 - rare
        return (often, mean / (2 * often)), (rare, mean / (2 * rare))

    def moment(self, order: int) -> float:
        return sum(p * math.factorial(order) * m**order for p, m in self.branches)

    def cdf(self, t: float) -> float:
        return -sum(p * math.expm1(-t / m) for p, m in self.branches) if t > 0 else 0.0

    def lst(self, s: complex) -> complex:
        (p1, m1), (p2, m2) = self.branches
        return p1 / (1 + s * m1) + p2 / (1 + s * m2)

    def sample(self, generator: "np.random.Generator", size: int) -> "Samples":
        (often, short), (_, long) = self.branches
        means = _numpy().where(generator.random(size) < often, short, long)
        times: Samples = generator.standard_exponential(size) * means
        return times

    def __str__(self) -> str:
        return f"H2(mean={time_text(self.mean)},scv={number_text(self.scv)})"


@final
@dataclass(frozen=True, slots=True)
class LogNormal:
    """LN: its logarithm is normal.

    Attributes:
        mean: Of the time itself, not of its logarithm, in seconds, above 0.
        scv: Of the time itself, at least 0.
    """

    mean: Fraction
    scv: Fraction

    def __post_init__(self) -> None:
        _require_positive("a mean time", self.mean)
        _require_scv(self.scv)

    @property
    def sigma(self) -> float:
        """Standard deviation of the logarithm."""
        return math.sqrt(math.log1p(float(self.scv)))

    def moment(self, order: int) -> float:
        return float(self.mean) ** order * (1 + float(self.scv)) ** (order * (order - 1) // 2)

    def cdf(self, t: float) -> float:
        if t <= 0:
            return 0.0
        centre = math.log(float(self.mean)) - self.sigma**2 / 2
        if self.sigma == 0:
            return 1.0 if t >= float(self.mean) else 0.0
        return 0.5 * math.erfc((centre - math.log(t)) / (self.sigma * math.sqrt(2)))

    def lst(self, s: complex) -> complex:
        times, weights = self.nodes()
        return complex(weights @ _numpy().exp(-s * times))

    def nodes(self) -> "tuple[Samples, Samples]":
        """Return times and weights whose sums are its expectations, for smooth functions."""
        return _lognormal_nodes(float(self.mean), self.sigma)

    def sample(self, generator: "np.random.Generator", size: int) -> "Samples":
        centre = math.log(float(self.mean)) - self.sigma**2 / 2
        return generator.lognormal(centre, self.sigma, size)

    def __str__(self) -> str:
        return f"LN(mean={time_text(self.mean)},scv={number_text(self.scv)})"


@final
@dataclass(frozen=True, slots=True)
class Uniform:
    """U: uniform between two times.

    Attributes:
        low: Seconds, at least 0.
        high: Seconds, above ``low``.
    """

    low: Fraction
    high: Fraction

    def __post_init__(self) -> None:
        if self.low < 0:
            raise ParameterError(f"a time is at least 0; it is {time_text(self.low)}")
        if self.high <= self.low:
            raise ParameterError(
                f"U goes from the smaller time to the larger; it is given {time_text(self.low)} "
                f"and {time_text(self.high)}"
            )
        _require_positive("the larger time", self.high)

    @property
    def mean(self) -> Fraction:
        return (self.low + self.high) / 2

    @property
    def scv(self) -> Fraction:
        return (self.high - self.low) ** 2 / 12 / self.mean**2

    def moment(self, order: int) -> float:
        power = order + 1
        return float((self.high**power - self.low**power) / (power * (self.high - self.low)))

    def cdf(self, t: float) -> float:
        low, high = float(self.low), float(self.high)
        return min(1.0, max(0.0, (t - low) / (high - low)))

    def lst(self, s: complex) -> complex:
        x = s * float(self.high - self.low)
        if abs(x) < 1e-3:
            # (1 − e⁻ˣ)/x, whose quotient loses its digits near 0.
            return cmath.exp(-s * float(self.low)) * (1 - x / 2 * (1 - x / 3 * (1 - x / 4)))
        if x.real > 0:
            return cmath.exp(-s * float(self.low)) * (1 - cmath.exp(-x)) / x
        return cmath.exp(-s * float(self.high)) * (cmath.exp(x) - 1) / x

    def sample(self, generator: "np.random.Generator", size: int) -> "Samples":
        return generator.uniform(float(self.low), float(self.high), size)

    def __str__(self) -> str:
        return f"U({time_text(self.low)},{time_text(self.high)})"


@final
@dataclass(frozen=True, slots=True)
class General:
    """G: of which only mean and scv are known.

    What depends on more than these two is not defined in a result. Samples are of a gamma
    distribution with these two moments, because something has to be drawn.

    Attributes:
        mean: Seconds, above 0.
        scv: At least 0.
    """

    mean: Fraction
    scv: Fraction

    def __post_init__(self) -> None:
        _require_positive("a mean time", self.mean)
        _require_scv(self.scv)

    def moment(self, order: int) -> float | None:
        if order > 2:
            return None
        mean = float(self.mean)
        return mean if order == 1 else mean * mean * (1 + float(self.scv))

    def cdf(self, t: float) -> None:
        return None

    def lst(self, s: complex) -> None:
        return None

    def sample(self, generator: "np.random.Generator", size: int) -> "Samples":
        mean, scv = float(self.mean), float(self.scv)
        if scv == 0:
            times: Samples = _numpy().full(size, mean)
            return times
        return generator.standard_gamma(1 / scv, size) * (mean * scv)

    def __str__(self) -> str:
        return f"G(mean={time_text(self.mean)},scv={number_text(self.scv)})"


@final
@dataclass(frozen=True, slots=True)
class Trace:
    """``trace(FILE)``: measured numbers, one on each line.

    As a service they are times, each as likely as the next. As arrivals they are the
    instants at which jobs came, ascending; :meth:`gaps` makes times of them. Empty lines
    and lines that start with ``#`` are skipped.

    Attributes:
        path: The file, as it was written.
        unit: Of the numbers in it.
        values: Seconds, in the order of the file.
    """

    path: str
    unit: str
    values: tuple[float, ...] = field(repr=False)

    @classmethod
    def read(cls, path: str, unit: str = "s") -> "Trace":
        """Return what stands in the file. Raises TraceError where it is of no use."""
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise TraceError(f"the trace {path} cannot be read: {error}") from error
        values = []
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            try:
                value = float(line)
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise TraceError(f"the trace {path}, line {number}: {line.strip()!r} is no number")
            values.append(value * float(UNITS[unit]))
        if not values:
            raise TraceError(f"the trace {path} is empty; it needs at least two numbers")
        if min(values) == max(values):
            raise TraceError(
                f"the trace {path} is constant: every line says {values[0]:.6g} s, which tells "
                "nothing of how it varies; for one fixed time, write D(…)"
            )
        return cls(path, unit, tuple(values))

    def as_service(self) -> "Trace":
        """Return it where every number may be a service time; raise TraceError otherwise."""
        if min(self.values) < 0:
            raise TraceError(f"the trace {self.path} has a negative time: {min(self.values)} s")
        return self

    def gaps(self) -> "Trace":
        """Return the times between the instants; raise TraceError where they do not ascend."""
        values = self.values
        for number, (earlier, later) in enumerate(itertools.pairwise(values), start=2):
            if later < earlier:
                raise TraceError(
                    f"the trace {self.path} is unsorted: instant {number}, {later:.6g} s, is "
                    f"before the one above it, {earlier:.6g} s"
                )
        gaps = tuple(later - earlier for earlier, later in itertools.pairwise(values))
        return Trace(self.path, self.unit, gaps)

    @property
    def mean(self) -> Fraction:
        return Fraction(math.fsum(self.values)) / len(self.values)

    @property
    def scv(self) -> Fraction:
        mean = float(self.mean)
        return Fraction(
            math.fsum((value - mean) ** 2 for value in self.values) / len(self.values) / mean**2
        )

    def moment(self, order: int) -> float:
        return math.fsum(value**order for value in self.values) / len(self.values)

    def cdf(self, t: float) -> float:
        return sum(value <= t for value in self.values) / len(self.values)

    def lst(self, s: complex) -> complex:
        times, weights = self.nodes()
        return complex(weights @ _numpy().exp(-s * times))

    def nodes(self) -> "tuple[Samples, Samples]":
        """Return its different times and how often each stands in the file."""
        times, counts = _numpy().unique(_numpy().asarray(self.values), return_counts=True)
        return times, counts / len(self.values)

    def sample(self, generator: "np.random.Generator", size: int) -> "Samples":
        return generator.choice(_numpy().asarray(self.values), size)

    def __str__(self) -> str:
        plain = not set(self.path) & set(',()"') and self.path == self.path.strip()
        path = self.path if plain else '"' + self.path + '"'
        return f"trace({path})" if self.unit == "s" else f"trace({path},unit={self.unit})"


def as_exponential(distribution: object) -> Exponential | None:
    """Return the exponential that ``distribution`` is, also where it goes by another letter."""
    match distribution:
        case Exponential():
            return distribution
        case Erlang(phases=1) | Hyperexponential(scv=1):
            return Exponential(distribution.mean)
    return None


def as_deterministic(distribution: object) -> Deterministic | None:
    """Return the constant that ``distribution`` is, also where it goes by another letter."""
    match distribution:
        case Deterministic():
            return distribution
        case LogNormal(scv=0) | General(scv=0):
            return Deterministic(distribution.mean)
    return None


# The normal variable behind a log-normal is summed from −10 to 10 standard deviations, where
# its density is 1e-22 of its peak. The trapezoid rule on an analytic function that vanishes at
# both ends converges faster than any power of its step.
_NORMAL_RANGE = 10.0
_NORMAL_NODES = 2401


@lru_cache(maxsize=8)
def _lognormal_nodes(mean: float, sigma: float) -> "tuple[Samples, Samples]":
    numpy = _numpy()
    x = numpy.linspace(-_NORMAL_RANGE, _NORMAL_RANGE, _NORMAL_NODES)
    weights = numpy.exp(-x * x / 2)
    return mean * numpy.exp(sigma * x - sigma * sigma / 2), weights / weights.sum()


if TYPE_CHECKING:
    import types

    def _numpy() -> "types.ModuleType": ...
else:

    def _numpy():
        """Return numpy, which reading and printing a model never needs."""
        try:
            import numpy
        except ModuleNotFoundError as error:
            raise MissingLibraryError("numpy") from error
        return numpy
