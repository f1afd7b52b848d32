"""M/G/1/q: the jobs that are refused, as a process.

Refusals come in a row, while a service lasts and the room is full. From the beginning of a
service with k present, the numbers at the beginnings of services are a Markov chain, and every
refusal belongs to one of its steps.
"""

import math
from typing import TYPE_CHECKING, Final

from molva.queueing.analytic.counts import arrivals_during
from molva.queueing.analytic.flows import scv_from_next
from molva.queueing.distributions import Distribution, LogNormal, Trace
from molva.queueing.result import Flow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]
    Matrix = NDArray[np.float64]

__all__ = ["first_passages", "refusals_of_single_server"]

# Waiting places beyond which the elimination, cubic in them, takes more than a second.
_MOST_PLACES: Final = 400

# Events during a service that are looked at one by one. More, and it takes seconds.
_MOST_EVENTS: Final = 20_000
_MOST_EVENTS_OF_NODES: Final = 500

# Below, the mean gap in seconds leaves the range of a double.
_LEAST_LOSS: Final = 1e-280


def refusals_of_single_server(
    arrival: float, service: Distribution, q: int, left: "Vector", throughput: float, loss: float
) -> Flow:
    """Return the overflow of M/G/1/q.

    Args:
        arrival: Jobs per second.
        service: Its transform is known.
        q: Waiting places.
        left: P(a departure leaves j behind), 0 ≤ j ≤ q.
        throughput: Jobs per second that are served.
        loss: Share of the arrivals that is refused.
    """
    rate = arrival * loss
    if q > _MOST_PLACES or loss < _LEAST_LOSS:
        return Flow(rate, is_poisson=False)
    return Flow(
        rate,
        scv=scv_from_next(rate, _next_refusal(arrival, service, q, left, throughput)),
        peakedness=_peakedness(arrival, service, q, left, throughput, rate),
        is_poisson=False,
    )


def _begins(q: int, left: "Vector") -> "Vector":
    """Return P(a service begins with 0, 1 … present): with 1 also where nobody was left."""
    import numpy

    begins: Vector = numpy.zeros(max(q, 1) + 1)
    begins[: q + 1] = left
    begins[1] += begins[0]
    begins[0] = 0.0
    return begins


def _next_refusal(
    arrival: float, service: Distribution, q: int, left: "Vector", throughput: float
) -> float:
    """Return the mean seconds from any instant to the next refusal."""
    import numpy

    counts = arrivals_during(service, arrival, q + 4)
    pmf, above, excess = counts.pmf, counts.above, counts.excess
    # From 0 present, and from the beginning of a service with 1 … present. Nothing is refused
    # in a service with k present while no more than q + 1 − k arrive.
    states = max(q, 1) + 1
    steps, ends, time = numpy.zeros((states, states)), numpy.zeros(states), numpy.zeros(states)
    steps[0, 1], time[0] = 1.0, 1 / arrival
    for k in range(1, states):
        room = q + 1 - k
        steps[k, k - 1 : q + 1] = pmf[: room + 1]
        ends[k], time[k] = above[room], above[: room + 1].sum() / arrival
    passage = first_passages(steps, ends, time)
    # Any instant is idle, or some arrivals before it and some after it share its service.
    until = float(left[0]) * throughput / arrival * float(passage[0])
    for m, share in enumerate(_begins(q, left).tolist()):
        if m == 0:
            continue
        room = q + 1 - m
        j = numpy.arange(room + 1)
        quiet = (j + 1) @ above[1 : room + 2] + excess[room + 2]
        later = (j + 1) * pmf[1 : room + 2] @ passage[m - 1 : q + 1]
        later += above[room + 1] * passage[q]
        until += throughput * share * float(quiet / arrival**2 + later / arrival)
    return until


def first_passages(steps: "Matrix", ends: "Vector", time: "Vector") -> "Vector":
    """Return the mean time until a chain ends, from each of its states.

    States are eliminated one by one. What a state keeps is never 1 − p but the sum of where
    else it goes, so that an end once in 1e30 steps keeps its digits.

    Args:
        steps: P(from i to j).
        ends: P(it ends) at each step from i.
        time: Mean time of a step from i.

    Source:
        Grassmann, Taksar and Heyman, Operations Research 33 (1985).
    """
    steps, ends, time = steps.copy(), ends.copy(), time.copy()
    states = len(ends)
    for i in range(states - 1):
        leaves = steps[i, i + 1 :].sum() + ends[i]
        back = steps[i + 1 :, i] / leaves
        steps[i + 1 :, i + 1 :] += back[:, None] * steps[i, i + 1 :]
        ends[i + 1 :] += back * ends[i]
        time[i + 1 :] += back * time[i]
    passage: Vector = time.copy()
    for i in range(states - 1, -1, -1):
        leaves = steps[i, i + 1 :].sum() + ends[i]
        passage[i] = (time[i] + steps[i, i + 1 :] @ passage[i + 1 :]) / leaves
    return passage


def _peakedness(
    arrival: float,
    service: Distribution,
    q: int,
    left: "Vector",
    throughput: float,
    rate: float,
) -> float | None:
    """Return variance over mean of the servers that the refused would keep busy.

    Those servers take exponential times of the same mean: 1 and the refusals that are expected
    after one refusal, each with the chance that the first is still served, less their load.
    """
    import numpy

    mu = 1 / float(service.mean)
    ended = service.lst(mu)
    assert ended is not None
    whole = ended.real
    # Arrivals before whichever comes first, the end of the service or a tick of rate μ.
    ticked = arrival / (arrival + mu)
    counts = arrivals_during(service, arrival + mu, q + 1)
    power = ticked ** numpy.arange(q + 2.0)
    together, under_way = power * counts.pmf, power * counts.above / (arrival + mu)
    states = max(q, 1) + 1
    system, refused = numpy.eye(states), numpy.zeros(states)
    system[0, 1] -= ticked
    for k in range(1, states):
        room = q + 1 - k
        refused[k] = arrival * ((1 - whole) / mu - under_way[:room].sum())
        system[k, k - 1 : k - 1 + room] -= together[:room]
        system[k, q] -= whole - together[:room].sum()
    expected = numpy.linalg.solve(system, refused)
    lasts = _still_serving(arrival, service, q, _begins(q, left)[1:] * throughput, rate, mu)
    if lasts is None:
        return None
    after = arrival / mu * (1 - lasts) + lasts * float(expected[q])
    return 1 + after - rate / mu


def _still_serving(
    arrival: float, service: Distribution, q: int, starts: "Vector", rate: float, mu: float
) -> float | None:
    """Return E[exp(−μr)], r what is left of the service when a job is refused.

    An instant of a service divides its N arrivals and ticks into j before and N − j after, each
    j as likely. At a refusal c of the first j were arrivals, and all after it were.
    """
    import numpy
    from scipy.special import betainc

    share = arrival / (arrival + mu)
    room = q + 1
    last = math.ceil((room + 12 * math.sqrt(room) + 60) / share + 40 / -math.log(share))
    if last > (_MOST_EVENTS_OF_NODES if isinstance(service, LogNormal | Trace) else _MOST_EVENTS):
        return None
    counts = arrivals_during(service, arrival + mu, last + 2)
    needed = room - numpy.arange(1.0, len(starts) + 1)  # c, for services begun with 1, 2 …
    total, mixed = numpy.zeros(len(starts)), numpy.zeros(len(starts))
    for n in range(last + 1):
        # P(Binomial(n) ≥ c); c = 0 is always reached.
        some = (needed > 0) & (needed <= n)
        reached = numpy.where(needed > 0, 0.0, 1.0)
        reached[some] = betainc(needed[some], n - needed[some] + 1, share)
        mixed = share * mixed + reached
        total += counts.pmf[n + 1] * mixed
    total += counts.above[last + 1] * mixed
    return float(starts @ total) / (arrival + mu) * arrival / rate
