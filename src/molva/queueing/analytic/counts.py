"""How many Poisson arrivals come during one service, with tails that keep their digits."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from molva.queueing.distributions import (
    Distribution,
    Erlang,
    Hyperexponential,
    LogNormal,
    Trace,
    Uniform,
    as_deterministic,
    as_exponential,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

__all__ = ["Counts", "arrivals_during", "poisson_excess"]

# The most Gauss-Legendre nodes for a uniform time. Poisson counts are smooth in it on a scale of
# their standard deviation, so these do for some 10⁴ arrivals during a service.
_UNIFORM_NODES: Final = 400

# Terms of a sum over all counts, beyond which it is not taken far below the mean.
_MOST_TERMS: Final = 100_000

# The normal variable behind a log-normal time: its range, up to where a density leaves the
# range of a double, because tiny losses come from there; its widest step, and steps in the scale
# on which a count varies with it. The trapezoid rule is then exact to a double.
_NORMAL_RANGE: Final = (-12.0, 37.0)
_WIDEST_STEP: Final = 0.15
_STEPS_OF_SCALE: Final = 2.5


@dataclass(frozen=True, slots=True)
class Counts:
    """Poisson arrivals A during one service, for 0 ≤ k ≤ some last k.

    Attributes:
        pmf: P(A = k).
        above: P(A > k).
        excess: E[(A − k)⁺].
    """

    pmf: "Vector"
    above: "Vector"
    excess: "Vector"


def arrivals_during(service: Distribution, arrival_rate: float, last: int) -> Counts:
    """Return the distribution of the arrivals during one service, up to ``last``."""
    constant, exponential = as_deterministic(service), as_exponential(service)
    if constant is not None:
        return _of_constant(arrival_rate * float(constant.mean), last)
    if exponential is not None:
        return _of_phases(1, arrival_rate * float(exponential.mean), last)
    match service:
        case Erlang():
            return _of_phases(
                service.phases, arrival_rate * float(service.mean) / service.phases, last
            )
        case Hyperexponential():
            return _mixed(
                [p for p, _ in service.branches],
                [_of_phases(1, arrival_rate * m, last) for _, m in service.branches],
            )
        case LogNormal():
            return _of_lognormal(service, arrival_rate, last)
        case Trace():
            times, weights = service.nodes()
            return _of_nodes(arrival_rate * times, weights, last)
        case Uniform():
            import numpy

            nodes = 60 + math.ceil(8 * math.sqrt(arrival_rate * float(service.high)))
            x, w = numpy.polynomial.legendre.leggauss(min(nodes, _UNIFORM_NODES))
            half = float(service.high - service.low) / 2
            return _of_nodes(arrival_rate * (float(service.mean) + half * x), w / 2, last)
    raise AssertionError(f"no counts for {service}")  # applies() admits nothing else


def _of_constant(mean: float, last: int) -> Counts:
    import numpy

    return _of_nodes(numpy.array([mean]), numpy.array([1.0]), last)


def _of_lognormal(service: LogNormal, arrival_rate: float, last: int) -> Counts:
    import numpy

    sigma = service.sigma
    # A Poisson count of up to ``last`` varies with the logarithm of its mean on a scale of
    # 1/√last.
    step = min(_WIDEST_STEP, 1 / (_STEPS_OF_SCALE * sigma * math.sqrt(last + 1)))
    x = numpy.arange(*_NORMAL_RANGE, step)
    weights = numpy.exp(-x * x / 2) * (step / math.sqrt(2 * math.pi))
    means = arrival_rate * float(service.mean) * numpy.exp(sigma * x - sigma * sigma / 2)
    # Where the mean is far beyond ``last``, so is the count.
    far = means > last + 40 * math.sqrt(last) + 1000
    near = _of_nodes(means[~far], weights[~far], last)
    share, total = float(weights[far].sum()), float(weights[far] @ means[far])
    k = numpy.arange(last + 1.0)
    return Counts(near.pmf, near.above + share, near.excess + (total - share * k))


def _mixed(weights: list[float], parts: list[Counts]) -> Counts:
    return Counts(
        pmf=sum((w * part.pmf for w, part in zip(weights, parts, strict=True)), 0 * parts[0].pmf),
        above=sum(
            (w * part.above for w, part in zip(weights, parts, strict=True)), 0 * parts[0].pmf
        ),
        excess=sum(
            (w * part.excess for w, part in zip(weights, parts, strict=True)), 0 * parts[0].pmf
        ),
    )


def _of_phases(phases: int, per_phase: float, last: int) -> Counts:
    """Return the counts of an Erlang time: a sum of ``phases`` geometric ones."""
    import numpy

    more = per_phase / (1 + per_phase)
    # Far enough for the tail sums to be complete to the last bit.
    spread = 60 + 12 * math.sqrt(phases * per_phase * (1 + per_phase))
    end = last + math.ceil(phases * per_phase + spread + 45 / -math.log(more))
    if end > _MOST_TERMS and 2 * last < phases * per_phase:
        return _of_many(phases, per_phase, last)
    k = numpy.arange(1, end + 1)
    log_pmf = numpy.concatenate(
        ([0.0], numpy.cumsum(numpy.log(more * (phases - 1 + k) / k)))
    ) - phases * math.log1p(per_phase)
    return _summed(numpy.exp(log_pmf), last)


def _of_many(phases: int, per_phase: float, last: int) -> Counts:
    """Return the same far below the mean, where differences lose nothing."""
    import numpy
    from scipy.special import betainc

    less, k = 1 / (1 + per_phase), numpy.arange(last + 1.0)
    below = betainc(phases, k + 1, less)  # P(A ≤ k)
    log_pmf = numpy.concatenate(
        ([0.0], numpy.cumsum(numpy.log((1 - less) * (phases - 1 + k[1:]) / k[1:])))
    ) + phases * math.log(less)
    # E[A; A ≤ k], of one phase and one arrival more.
    part = phases * per_phase * betainc(phases + 1, numpy.maximum(k, 1.0), less) * (k > 0)
    excess = phases * per_phase - part - k * (1 - below)
    return Counts(numpy.exp(log_pmf), 1 - below, excess)


def _summed(pmf: "Vector", last: int) -> Counts:
    """Return the counts from a whole pmf, its tails summed from the far end."""
    import numpy

    above = numpy.concatenate((numpy.cumsum(pmf[:0:-1])[::-1], [0.0]))
    # E[(A−k)⁺] is the sum of P(A > j) over j ≥ k.
    excess = numpy.cumsum(above[::-1])[::-1]
    return Counts(pmf[: last + 1], above[: last + 1], excess[: last + 1])


def _of_nodes(means: "Vector", weights: "Vector", last: int) -> Counts:
    """Return the counts of a Poisson mean that is one of ``means``."""
    import numpy
    from scipy.special import gammaln, pdtrc

    k = numpy.arange(last + 1.0)
    pmf, above, excess = numpy.zeros(last + 1), numpy.zeros(last + 1), numpy.zeros(last + 1)
    log_factorial = gammaln(k + 1)
    for mean, weight in zip(means.tolist(), weights.tolist(), strict=True):
        if weight < 1e-300:
            continue
        one = (k == 0) * 1.0
        if mean > 0:
            one = numpy.exp(k * math.log(mean) - mean - log_factorial)
        tail = pdtrc(k, mean)
        pmf += weight * one
        above += weight * tail
        excess += weight * poisson_excess(k, mean, one, tail)
    return Counts(pmf, above, excess)


def poisson_excess(k: "Vector", mean: float, pmf: "Vector", above: "Vector") -> "Vector":
    """Return E[(A − k)⁺] of a Poisson count A, without cancellation far above its mean."""
    import numpy

    direct = mean * (above + pmf) - k * above
    far = k > mean + 1
    # (A − k)⁺ beyond the mean: pmf(k) Σ_i i Π mean/(k+1) … mean/(k+i).
    start = k[far]
    term, total = pmf[far].copy(), numpy.zeros(far.sum())
    for i in range(1, 20_000):
        term *= mean / (start + i)
        total += i * term
        if (i * term <= 1e-17 * total).all():
            break
    direct[far] = total
    result: Vector = direct
    return result
