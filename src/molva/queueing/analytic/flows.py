"""What leaves a station: the jobs served and the jobs refused, as processes.

Where arrivals and service are without memory both follow from first passages of the number
present, one state after the other. Only ratios are kept from state to state, so a refusal that
happens once in 1e60 years has an exact gap. A walk over a million servers starts a dozen
standard deviations below their load, because it forgets its start.

One identity carries the rest: a stationary flow of rate ρ whose next event is T away in the
mean, seen at any instant, has gaps of scv 2ρT − 1.
"""

import math
from collections.abc import Sequence
from typing import Final

from molva.queueing.analytic._residual import shortest_residual
from molva.queueing.analytic.erlang import far_below
from molva.queueing.distributions import Distribution
from molva.queueing.result import Flow

__all__ = [
    "birth_death_output",
    "birth_death_refusals",
    "loss_station_output",
    "memoryless_output_scv",
    "output_of_single_server",
    "scv_from_next",
]

# States beyond which a walk over all of them would take longer than the answer is worth: a
# second. The shape of the flow is then left undefined.
_MOST_STATES: Final = 1_500_000

# Below, the mean gap in seconds leaves the range of a double.
_LEAST_LOSS: Final = 1e-280


def scv_from_next(rate: float, next_event: float) -> float:
    """Return the scv of the gaps of a stationary flow.

    Args:
        rate: Events per second.
        next_event: Mean seconds from any instant to the next event.
    """
    # A gap is met with a chance in proportion to its length, and half of it is left:
    # next_event = E[G²] / (2 E[G]).
    return 2 * rate * next_event - 1


def birth_death_refusals(arrival: float, service: float, n: int, q: int, loss: float) -> Flow:
    """Return the overflow of M/M/n/q, which is a renewal process.

    Its gaps are the times from one refusal to the next, that is from all places taken until
    the next arrival that finds them taken.

    Source:
        First passages of a birth-death process; for q = 0 the peakedness is Wilkinson's
        1 − α + a/(n + 1 − a + α), with α = aB (1956).
    """
    load = arrival / service
    start = max(0, math.floor(far_below(min(load, n))))
    if n + q - start > _MOST_STATES or loss < _LEAST_LOSS:
        return Flow(arrival * loss)
    second = 2.0  # E[T²]/E[T]² of the time T from k present until an arrival finds k
    mean = 1 / (arrival - start * service)
    rest = 1 / (1 + load - start)  # 1 − E[e^(−μT)]
    for k in range(start + 1, n + q + 1):
        down = min(k, n) * service
        before = second, rest
        shorter, mean = mean, (1 + down * mean) / arrival
        # T is a stay in k and then, with the probability ``back``, two more passages.
        back = down / (arrival + down)
        stay = 1 / (arrival + down)
        ratio = shorter / mean
        part = stay / mean
        second = (
            2 * part * (part + back * (ratio + 1)) + back * (second * ratio * ratio + 2 * ratio)
        ) / (1 - back)
        rest = (down * rest + service) / (arrival + down * rest + service)
        if k > n and before == (second, rest):
            break  # and so it stays: every place more is like the last
    carried = arrival * loss / service
    return Flow(
        rate=arrival * loss,
        scv=second - 1,
        peakedness=1 / rest - carried,
        is_poisson=False,
    )


def birth_death_output(arrival: float, service: float, n: int, q: int, throughput: float) -> Flow:
    """Return the output of M/M/n/q; its gaps are not independent, so only their scv is given."""
    load = arrival / service
    start = max(0, math.floor(far_below(min(load, n))))
    # So many are never busy: to stop there changes nothing but the time it takes.
    never = math.ceil(load + 12 * math.sqrt(load) + 200)
    if n > never:
        n, q = never, 0
    if n - start > _MOST_STATES:
        return Flow(throughput)
    # A departure leaves k behind as often as an arrival finds k and is admitted.
    weights = [1.0]
    for k in range(start + 1, n):
        weights.append(weights[-1] * load / k)
        if weights[-1] > 1e200:
            weights = [each / 1e200 for each in weights]
    rho = load / n
    # n, n+1 … n+q−1: Σ ρ^m, from the last of those below n.
    power = 1.0 if rho == 1 else (rho**q - 1) / (rho - 1) if q * math.log(rho) < 600 else math.inf
    busy = weights[-1] * rho * (q if rho == 1 else power)
    scv = memoryless_output_scv(arrival, service, start, weights, busy, n)
    return Flow(throughput, scv=scv, is_poisson=False)


def memoryless_output_scv(
    events: float,
    service: float,
    start: int,
    weights: Sequence[float],
    busy: float,
    servers: int,
    *,
    batch: int = 1,
) -> float:
    """Return the scv of the gaps between departures of exponential servers.

    Args:
        events: Instants of arrival per second, without memory.
        service: Jobs per second that one server completes.
        start: The fewest jobs that a departure leaves behind.
        weights: How often it leaves ``start``, start+1 … n−1 behind, not normalised.
        busy: How often it leaves n or more, on the same scale.
        servers: n.
        batch: Jobs that arrive at an instant.
    """
    full = servers * service
    if math.isinf(busy):
        return 1.0  # all servers are always busy: gaps are exponential
    # Moments of the time to the next departure, from each state down from n. In n and above
    # all servers are busy.
    first = [0.0] * (servers - start)
    second = [0.0] * (servers - start)
    busy_first, busy_second = 1 / full, 2 / full**2
    for k in range(servers - 1, start - 1, -1):
        if k + batch >= servers:
            up_first, up_second = busy_first, busy_second
        else:
            up_first, up_second = first[k + batch - start], second[k + batch - start]
        out = events + k * service
        first[k - start] = (1 + events * up_first) / out
        second[k - start] = (2 * first[k - start] + events * up_second) / out
    total = math.fsum(weights) + busy
    mean = (math.fsum(map(float.__mul__, weights, first)) + busy * busy_first) / total
    square = (math.fsum(map(float.__mul__, weights, second)) + busy * busy_second) / total
    return square / mean**2 - 1


def loss_station_output(arrival: float, service: Distribution, n: int, loss: float) -> Flow:
    """Return the output of M/G/n/0.

    Seen backwards in time it is the flow of admissions, and those go on until all servers are
    busy: from then on none is admitted before the first of n residual service times ends.

    Source:
        Reversibility of the loss station, Shanbhag and Tambouratzis (1973).
    """
    rate = arrival * (1 - loss)
    shortest = shortest_residual(service, n)
    if shortest is None:
        return Flow(rate)
    return Flow(rate, scv_from_next(rate, 1 / arrival + loss * shortest), is_poisson=False)


def output_of_single_server(
    arrival_rate: float, arrival_scv: float, service: Distribution, mean_wait: float
) -> Flow:
    """Return the output of G/G/1/inf, whose scv follows from the mean wait.

    Source:
        Marshall, "Some inequalities in queuing", Operations Research 16 (1968).
    """
    rho = arrival_rate * float(service.mean)
    scv = (
        arrival_scv
        + 2 * rho * rho * float(service.scv)
        - 2 * rho * (1 - rho) * mean_wait / float(service.mean)
    )
    return Flow(arrival_rate, scv)
