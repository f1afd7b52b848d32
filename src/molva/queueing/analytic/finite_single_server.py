"""M/G/1/q: one server, q waiting places, Poisson arrivals, any service time.

Seen when a job leaves, the number left behind is a Markov chain. It goes down by one at most,
so the flow down over each level equals the flow up: that gives one probability after the
other by additions alone. The loss is what arrives in a service beyond the free places, also a
sum of positive terms, so a loss of 1e-30 keeps its digits.
"""

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
from molva.queueing.model import Bulk, Model, Renewal
from molva.queueing.result import NUMERICAL, Flow, SteadyState

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

__all__ = ["METHOD", "Counts", "applies", "arrivals_during", "poisson_excess", "solve"]

METHOD: Final = "embedded-chain"
_SOURCE: Final = (
    "embedded Markov chain; Gross, Shortle, Thompson and Harris (2008), section 5.1.8; "
    "by level crossings, Tijms, A First Course in Stochastic Models (2003)"
)

# Waiting places beyond which the chain, quadratic in them, takes more than a few seconds.
_MOST_PLACES: Final = 20_000

# Gauss-Legendre nodes for a uniform time. Poisson counts are smooth in it on a scale of their
# standard deviation, so these do for some 10⁴ arrivals during a service.
_UNIFORM_NODES: Final = 400


def applies(model: Model) -> bool:
    """Whether it is one server with places for some, and arrivals are single and Poisson."""
    arrivals = model.arrivals
    return (
        model.servers == 1
        and model.waiting is not None
        and model.waiting <= _MOST_PLACES
        and not isinstance(model.service, Bulk)
        and model.service.lst(1.0) is not None
        and isinstance(arrivals, Renewal)
        and arrivals.batch == 1
        and as_exponential(arrivals.gap) is not None
    )


def solve(model: Model) -> SteadyState:
    """Return the steady state of M/G/1/q."""
    import numpy

    service, q = model.service, model.waiting
    assert not isinstance(service, Bulk)
    assert q is not None
    arrival, rho, mean = model.arrival_rate, model.offered_load, float(service.mean)
    counts = arrivals_during(service, arrival, q + 1)
    left = _left_behind(counts, q)
    # Of each cycle from departure to departure: arrivals, and those that find no place.
    cycle = float(left[0]) + rho
    room = numpy.array([q, *range(q, 0, -1)][: q + 1])
    lost = float(left @ counts.excess[room])
    loss = lost / cycle
    admitted = 1 / cycle
    # An arrival finds j present, j ≤ q, as often as a departure leaves j behind.
    in_system = float(numpy.arange(q + 1) @ left) * admitted + (q + 1) * loss
    mean_waiting = in_system - rho * admitted
    throughput = arrival * admitted
    idle_gap = float(left[0]) / arrival
    mean_gap = mean + idle_gap
    second_gap = (service.moment(2) or 0.0) + 2 * mean * idle_gap + 2 * float(left[0]) / arrival**2
    return SteadyState(
        model=model,
        road=NUMERICAL,
        method=METHOD,
        source=_SOURCE,
        utilisation=rho * admitted,
        loss_probability=loss,
        probability_of_waiting=1 - float(left[0]),
        throughput=throughput,
        mean_wait=mean_waiting / throughput,
        mean_time_in_system=in_system / throughput,
        mean_waiting=mean_waiting,
        mean_in_system=in_system,
        output=Flow(throughput, second_gap / mean_gap**2 - 1, is_poisson=False),
        refusals=Flow(arrival * loss, is_poisson=False),
    )


def _left_behind(counts: "Counts", q: int) -> "Vector":
    """Return P(a departure leaves j behind), 0 ≤ j ≤ q."""
    import numpy

    left = numpy.zeros(q + 1)
    left[0] = 1.0
    above = counts.above
    for j in range(q):
        # Down from j+1 with no arrival; up over j from 0 and from 1 … j.
        up = left[0] * above[j] + (left[1 : j + 1] @ above[j:0:-1] if j else 0.0)
        left[j + 1] = up / counts.pmf[0]
        if left[j + 1] > 1e200:
            left /= left[j + 1]
    result: Vector = left / left.sum()
    return result


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
        case LogNormal() | Trace():
            times, weights = service.nodes()
            return _of_nodes(arrival_rate * times, weights, last)
        case Uniform():
            import numpy

            x, w = numpy.polynomial.legendre.leggauss(_UNIFORM_NODES)
            half = float(service.high - service.low) / 2
            return _of_nodes(arrival_rate * (float(service.mean) + half * x), w / 2, last)
    raise AssertionError(f"no counts for {service}")  # applies() admits nothing else


def _of_constant(mean: float, last: int) -> Counts:
    import numpy

    return _of_nodes(numpy.array([mean]), numpy.array([1.0]), last)


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
    k = numpy.arange(1, end + 1)
    log_pmf = numpy.concatenate(
        ([0.0], numpy.cumsum(numpy.log(more * (phases - 1 + k) / k)))
    ) - phases * math.log1p(per_phase)
    return _summed(numpy.exp(log_pmf), last)


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
    for mean, weight in zip(means.tolist(), weights.tolist(), strict=True):
        if weight < 1e-300:
            continue
        one = numpy.exp(k * math.log(mean) - mean - gammaln(k + 1)) if mean > 0 else (k == 0) * 1.0
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
