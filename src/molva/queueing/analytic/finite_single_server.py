"""M/G/1/q: one server, q waiting places, Poisson arrivals, any service time.

Seen when a job leaves, the number left behind is a Markov chain. It goes down by one at most,
so the flow down over each level equals the flow up: that gives one probability after the
other by additions alone. The loss is what arrives in a service beyond the free places, also a
sum of positive terms, so a loss of 1e-30 keeps its digits.
"""

from typing import TYPE_CHECKING, Final

from molva.queueing.analytic.counts import Counts, arrivals_during
from molva.queueing.analytic.finite_flows import refusals_of_single_server
from molva.queueing.analytic.finite_waits import RoomWaits
from molva.queueing.distributions import Trace, as_exponential
from molva.queueing.model import Bulk, Model, Renewal
from molva.queueing.result import NUMERICAL, Flow, SteadyState

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

__all__ = ["METHOD", "applies", "solve"]

METHOD: Final = "embedded-chain"
_SOURCE: Final = (
    "embedded Markov chain; Gross, Shortle, Thompson and Harris (2008), section 5.1.8; "
    "by level crossings, Tijms, A First Course in Stochastic Models (2003)"
)

# Waiting places beyond which the chain, quadratic in them, takes more than a few seconds.
_MOST_PLACES: Final = 20_000

# Probability that nobody arrives in a service, below which nobody ever does.
_NEVER: Final = 1e-290

# The inversion is exact to 1e-10 where the wait is smooth; see ``single_server``.
_JUMPY: Final = "numerical, error < 1e-3"


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
    starts = throughput * left[1:]
    starts[:1] += throughput * left[0]
    waits = RoomWaits(arrival, service, starts, loss) if model.discipline == "fifo" else None
    return SteadyState(
        model=model,
        road=_JUMPY if isinstance(service, Trace) else NUMERICAL,
        method=METHOD,
        source=_SOURCE,
        utilisation=rho * admitted,
        loss_probability=loss,
        probability_of_waiting=1 - float(left[0]),
        throughput=throughput,
        mean_wait=mean_waiting / throughput,
        mean_squared_wait=waits.squared if waits else None,
        mean_time_in_system=in_system / throughput,
        mean_waiting=mean_waiting,
        mean_in_system=in_system,
        wait=waits.wait if waits else None,
        time_in_system=waits.time_in_system if waits else None,
        output=Flow(throughput, second_gap / mean_gap**2 - 1, is_poisson=False),
        refusals=refusals_of_single_server(arrival, service, q, left, throughput, loss),
    )


def _left_behind(counts: "Counts", q: int) -> "Vector":
    """Return P(a departure leaves j behind), 0 ≤ j ≤ q."""
    import numpy

    left = numpy.zeros(q + 1)
    if q and counts.pmf[0] < _NEVER:
        left[q] = 1.0  # the room is filled in every service
        return left
    left[0] = 1.0
    above = counts.above
    for j in range(q):
        # Down from j+1 with no arrival; up over j from 0 and from 1 … j.
        up = left[0] * above[j] + (left[1 : j + 1] @ above[j:0:-1] if j else 0.0)
        left[j + 1] = up / counts.pmf[0]
        if left[j + 1] > 1e10:
            left /= left[j + 1]
    result: Vector = left / left.sum()
    return result
