"""M/G^[1,K]/1: a server that takes what has piled up, up to K jobs, in a + b·k seconds.

That is how a worker behaves that commits a batch in one transaction. Taken for a server of
single jobs it is an order of magnitude faster than the model, and so is the model wrong.

Seen when a bulk ends, the number left behind is a Markov chain. Far out it falls by the
geometric ratio β of a server that always takes K, so the states beyond some level are summed
in closed form, and heavy traffic needs no more of them than light traffic does.
"""

import math
from typing import TYPE_CHECKING, Final

from molva.queueing.analytic.bulk_waits import BulkWaits, Group
from molva.queueing.analytic.constant_service import pole_less_one
from molva.queueing.analytic.counts import poisson_excess
from molva.queueing.distributions import as_exponential
from molva.queueing.errors import NoAnalysisError, UnstableError
from molva.queueing.model import Bulk, Model, Renewal
from molva.queueing.result import NUMERICAL, Flow, SteadyState, Tail

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

__all__ = ["METHOD", "applies", "solve"]

METHOD: Final = "bulk"
_SOURCE: Final = (
    "embedded Markov chain of Bailey's bulk queue (1954), extended to times that depend on the "
    "bulk, Neuts (1967)"
)

# States of the chain, beyond which solving it takes more than a few seconds. All can wait:
# levels in multiples of K and beside them, by which the second pole has faded.
_MOST_STATES: Final = 2500
_LEVELS: Final = 6
_MARGIN: Final = 200

# Difference of the last two states from the ratio β that is still taken for rounding.
_FADED: Final = 1e-7

# States left of a bulk that the distribution of the wait sums over. More, in heavy traffic,
# and one percentile takes seconds: then only means are given.
_MOST_SUMMED: Final = 20_000


def applies(model: Model) -> bool:
    """Whether one server takes bulks of single Poisson arrivals."""
    arrivals = model.arrivals
    return (
        isinstance(model.service, Bulk)
        and model.servers == 1
        and isinstance(arrivals, Renewal)
        and arrivals.batch == 1
        and as_exponential(arrivals.gap) is not None
    )


def solve(model: Model) -> SteadyState:
    """Return the steady state of a bulk server.

    Raises:
        UnstableError: All can wait, and full bulks are not fast enough.
        NoAnalysisError: The chain has more states than are solved here.
    """
    chain = _Chain(model)
    arrival = model.arrival_rate
    # Of a cycle from one end of a bulk to the next.
    busy = float(chain.left @ chain.times) + chain.beyond * chain.full_time
    cycle = busy + float(chain.left[0]) / arrival
    taken = float(chain.left @ chain.taken) + chain.beyond * chain.limit
    waiting, lost = chain.waiting_and_lost()
    loss = lost / (arrival * cycle)
    throughput = taken / cycle
    served = float(chain.left @ (chain.taken * chain.times))
    served += chain.beyond * chain.limit * chain.full_time
    mean_waiting, mean_served = waiting / cycle, served / cycle
    waits = _waits(chain, model, cycle, loss) if model.discipline == "fifo" else None
    return SteadyState(
        model=model,
        road=NUMERICAL,
        method=METHOD,
        source=_SOURCE,
        utilisation=busy / cycle,
        loss_probability=loss,
        probability_of_waiting=max(0.0, busy / cycle - loss) / (1 - loss),
        throughput=throughput,
        mean_wait=mean_waiting / throughput,
        mean_time_in_system=(mean_waiting + mean_served) / throughput,
        mean_waiting=mean_waiting,
        mean_in_system=mean_waiting + mean_served,
        wait=Tail(waits.wait_tail, chain.full_time) if waits else None,
        time_in_system=Tail(waits.time_in_system_tail, chain.full_time)
        if waits and waits.has_times_in_system
        else None,
        output=Flow(throughput, is_poisson=False),
        refusals=None if model.waiting is None else Flow(arrival * loss, is_poisson=False),
    )


class _Chain:
    """The number left behind when a bulk ends, and what the next bulk then is.

    Attributes:
        left: P(L = j left behind), j from 0.
        beyond: P(L is larger than all of these).
        taken: Jobs in the next bulk, after j were left.
        times: Seconds that it takes.
        ratio: β of the geometric tail beyond.
    """

    def __init__(self, model: Model) -> None:
        import numpy

        service = model.service
        assert isinstance(service, Bulk)
        self.arrival, self.places, self.limit = model.arrival_rate, model.waiting, service.limit
        self.full_time = float(service.time(service.limit))
        free = 1 - model.arrivals.rate * service.mean
        if self.places is None:
            if free <= 0:
                capacity = model.service_rate
                raise UnstableError(str(model), arrival_rate=self.arrival, capacity=capacity)
            self.ratio = 1 / (1 + pole_less_one(float(free)))
            last = _LEVELS * self.limit + _MARGIN
        else:
            self.ratio, last = 0.0, self.places
        if last > _MOST_STATES:
            raise NoAnalysisError(
                f"{model} has {last} states, and at most {_MOST_STATES} are solved here; take a "
                "smaller bulk or fewer waiting places"
            )
        self.taken = numpy.clip(numpy.arange(last + 1.0), 1, self.limit)
        self.times = float(service.base) + float(service.per_job) * self.taken
        self.left = self._solved(last)
        self.beyond = 0.0
        if self.places is None:
            tail = float(self.left[-1]) / (1 - self.ratio)
            self.beyond = tail * self.ratio
            drift = abs(self.left[-1] - self.ratio * self.left[-2])
            if drift > _FADED * self.left[-1] and drift > 1e-14:
                raise NoAnalysisError(f"{model}: the numbers left do not settle to a ratio")

    def _solved(self, last: int) -> "Vector":
        import numpy
        from scipy.special import pdtr

        # below[j, i] = P(at most i are left | j were): the balance of all states up to i is
        # that flow, and cumulated it has no rounding of small differences.
        remaining = numpy.arange(last + 1.0) - numpy.minimum(numpy.arange(last + 1.0), self.limit)
        state = numpy.arange(last + 1.0)
        counts = state[None, :] - remaining[:, None]
        below = numpy.where(
            counts >= 0, pdtr(numpy.maximum(counts, 0), self.arrival * self.times[:, None]), 0.0
        )
        equations = below.T.copy()
        if self.places is None:
            # L = last + m, m ≥ 1, with P(last) βᵐ: as far as it can fall to ``last`` at once.
            for m in range(1, self.limit + 1):
                reach = state - (last + m - self.limit)
                falls = pdtr(numpy.maximum(reach, 0), self.arrival * self.full_time)
                equations[:, last] += numpy.where(reach >= 0, falls, 0.0) * self.ratio**m
        else:
            equations[last] = 1.0  # everything beyond the last place is refused
        equations -= numpy.tri(last + 1)
        total = numpy.ones(last + 1)
        if self.places is None:
            total[last] = 1 / (1 - self.ratio)
        equations[last] = total
        right = numpy.zeros(last + 1)
        right[last] = 1.0
        solved: Vector = numpy.maximum(numpy.linalg.solve(equations, right), 0.0)
        return solved

    def waiting_and_lost(self) -> tuple[float, float]:
        """Return ∫ jobs waiting dt, and the jobs refused, in the mean of a cycle."""
        import numpy

        state = numpy.arange(len(self.left))
        kept = state - numpy.minimum(state, self.limit)
        if self.places is None:
            inflow = self.arrival * self.times**2 / 2
            waiting = float(self.left @ (kept * self.times + inflow))
            # L − K beyond, in the mean: its first value, and a geometric count.
            further = len(self.left) - self.limit + self.ratio / (1 - self.ratio)
            time = self.full_time
            return waiting + self.beyond * (further * time + self.arrival * time**2 / 2), 0.0
        waiting = lost = 0.0
        for j, probability in enumerate(self.left.tolist()):
            room, time = self.places - int(kept[j]), float(self.times[j])
            held, refused = _fills(self.arrival, time, room)
            waiting += probability * (int(kept[j]) * time + held)
            lost += probability * refused
        return waiting, lost


def _fills(arrival: float, time: float, room: int) -> tuple[float, float]:
    """Return ∫ E[min(A(u), room)] du over a bulk's time, and E[(A(time) − room)⁺]."""
    import numpy
    from scipy.special import pdtrc

    mean = arrival * time
    i = numpy.arange(room + 2.0)
    above = pdtrc(i, mean)  # P(A > i)
    # ∫ P(A(u) > i) du = time P(A > i) − (i+1)/λ P(A > i+1), by parts.
    held = float((time * above[:room] - (i[:room] + 1) / arrival * above[1 : room + 1]).sum())
    pmf = above[room - 1] - above[room] if room else math.exp(-mean)
    at = numpy.array([float(room)])
    exact = numpy.exp(room * math.log(mean) - mean - math.lgamma(room + 1)) if room else pmf
    lost = poisson_excess(at, mean, numpy.array([exact]), above[room : room + 1])
    return held, float(lost[0])


def _waits(chain: _Chain, model: Model, cycle: float, loss: float) -> BulkWaits | None:
    """Return what an arrival meets; None where there is too much to sum over."""
    import numpy

    service, k = model.service, chain.limit
    assert isinstance(service, Bulk)
    left = chain.left
    if chain.places is None:
        more = math.ceil(40 / -math.log(chain.ratio))
        if len(left) + more > _MOST_SUMMED:
            return None
        left = numpy.concatenate((left, left[-1] * chain.ratio ** numpy.arange(1, more + 1)))
    single = [Group(float(chain.times[j]), left[j : j + 1]) for j in range(min(k, len(left)))]
    kept = Group(chain.full_time, left[k:])
    return BulkWaits(
        arrival=chain.arrival,
        limit=k,
        base=float(service.base),
        per_job=float(service.per_job),
        places=chain.places,
        groups=(*single, kept) if len(left) > k else tuple(single),
        idle=float(chain.left[0]) / chain.arrival,
        admitted=cycle * (1 - loss),
    )
