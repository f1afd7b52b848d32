"""D/D/n/q, exactly: everything is determined, so it is played until it repeats itself.

Times are whole ticks of the largest unit that divides both, so instants that should meet do
meet: sums of floats lose one tie in twenty, and with it the answer. At the same instant a
departure comes before an arrival, and jobs that arrive together are admitted one by one.
"""

import itertools
import math
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from molva.queueing.distributions import as_deterministic
from molva.queueing.errors import NoAnalysisError, UnstableError
from molva.queueing.model import Model, Renewal
from molva.queueing.result import CLOSED_FORM, Flow, Multiset, SteadyState

__all__ = ["METHOD", "Schedule", "applies", "schedule", "solve"]

METHOD: Final = "schedule"
_SOURCE: Final = "played in exact ticks over one period; a departure comes before an arrival"

# Unfinished jobs that are looked at, over all arrivals, before the search for a period is given
# up: a few seconds, and a hundred megabytes. So long are periods only where gap and service
# time have no common measure to speak of, or where a large room has yet to fill.
_MOST_LOOKS: Final = 5_000_000


@dataclass(frozen=True, slots=True)
class Schedule:
    """One period of D/D/n/q, from some arrival on, which then repeats for ever.

    Attributes:
        period: Seconds until everything repeats.
        waits: Of each arrival of the period, in order, in seconds; None for one refused.
        departures: Instants of the period at which a job ends, ascending, modulo the period.
        refusals: Instants at which one is refused, ascending.
    """

    period: Fraction
    waits: tuple[Fraction | None, ...]
    departures: tuple[Fraction, ...]
    refusals: tuple[Fraction, ...]


def applies(model: Model) -> bool:
    """Whether gaps and service times are constant."""
    return (
        model.servers is not None
        and isinstance(model.arrivals, Renewal)
        and as_deterministic(model.arrivals.gap) is not None
        and as_deterministic(model.service) is not None
    )


def solve(model: Model) -> SteadyState:
    """Return the steady state of D/D/n/q, over one period.

    Raises:
        UnstableError: All can wait, and λ > nμ. At λ = nμ the line stays as it is.
        NoAnalysisError: The period is too long to be played.
    """
    n = model.servers
    assert n is not None
    plan = schedule(model)
    time = model.service.mean
    arrived = len(plan.waits)
    waits = sorted(wait for wait in plan.waits if wait is not None)
    served = len(waits)
    total = sum(waits, Fraction(0))
    mean_wait = total / served
    refused = Fraction(arrived - served, arrived)
    squared = sum((wait * wait for wait in waits), Fraction(0)) / served
    fifo = model.discipline == "fifo" or not total
    return SteadyState(
        model=model,
        road=CLOSED_FORM,
        method=METHOD,
        source=_SOURCE,
        utilisation=float(served * time / (n * plan.period)),
        loss_probability=float(refused),
        probability_of_waiting=sum(wait > 0 for wait in waits) / served,
        throughput=float(served / plan.period),
        mean_wait=float(mean_wait),
        mean_squared_wait=float(squared) if fifo else None,
        mean_time_in_system=float(mean_wait + time),
        mean_waiting=float(total / plan.period),
        mean_in_system=float((total + served * time) / plan.period),
        wait=Multiset(tuple(waits)) if fifo else None,
        time_in_system=Multiset(tuple(wait + time for wait in waits)) if fifo else None,
        output=_flow(plan.departures, plan.period),
        refusals=_flow(plan.refusals, plan.period) if model.waiting is not None else None,
    )


def schedule(model: Model) -> Schedule:
    """Return the period that D/D/n/q comes to, from an empty start; see ``solve``."""
    arrivals, n, q = model.arrivals, model.servers, model.waiting
    assert isinstance(arrivals, Renewal)
    assert n is not None
    if q is None and arrivals.rate * model.service.mean > n:
        raise UnstableError(
            str(model), arrival_rate=model.arrival_rate, capacity=n * model.service_rate
        )
    gap, time, batch = arrivals.gap.mean, model.service.mean, arrivals.batch
    tick = Fraction(1, math.lcm(gap.denominator, time.denominator))
    station = _Station(n, q, int(time / tick))
    step = int(gap / tick)
    seen: dict[tuple[int, ...], int] = {}
    waits: list[list[int | None]] = []
    looks = 0
    for instant in itertools.count():
        looks += 1 + len(station.begins)
        if looks > _MOST_LOOKS:
            break
        state = station.state()
        if state in seen:
            first = seen[state]
            return _period(waits[first:], step, int(time / tick), tick)
        seen[state] = instant
        waits.append([station.arrive() for _ in range(batch)])
        station.pass_time(step)
    raise NoAnalysisError(
        f"{model} does not repeat within {instant} arrivals; give both times as multiples of a "
        "common unit, or fewer waiting places"
    )


class _Station:
    """Servers and waiting places at one instant, in ticks from now."""

    def __init__(self, n: int, q: int | None, time: int) -> None:
        self.n, self.q, self.time = n, q, time
        # Ticks until each unfinished job begins (below 0: it has) in order of arrival. With
        # equal service times they also end in this order.
        self.begins: deque[int] = deque()

    def state(self) -> tuple[int, ...]:
        return tuple(self.begins)

    def arrive(self) -> int | None:
        """Admit a job now; return the ticks that it waits, or None where it is refused."""
        begins = self.begins
        if len(begins) < self.n:
            wait = 0
        elif self.q is not None and len(begins) >= self.n + self.q:
            return None
        else:
            # It follows the n-th job before it on a server.
            wait = begins[len(begins) - self.n] + self.time
        begins.append(wait)
        return wait

    def pass_time(self, ticks: int) -> None:
        kept = (begin - ticks for begin in self.begins)
        self.begins = deque(begin for begin in kept if begin > -self.time)


def _period(waits: list[list[int | None]], step: int, time: int, tick: Fraction) -> Schedule:
    length = step * len(waits)
    ends, refused = [], []
    for index, batch in enumerate(waits):
        for wait in batch:
            if wait is None:
                refused.append(index * step)
            else:
                ends.append((index * step + wait + time) % length)
    flat = tuple(None if wait is None else wait * tick for batch in waits for wait in batch)
    return Schedule(
        period=length * tick,
        waits=flat,
        departures=tuple(end * tick for end in sorted(ends)),
        refusals=tuple(at * tick for at in refused),
    )


def _flow(instants: tuple[Fraction, ...], period: Fraction) -> Flow:
    """Return the flow that has these instants in each period."""
    if not instants:
        return Flow(0.0)
    following = (*instants[1:], instants[0] + period)
    gaps = [later - earlier for earlier, later in zip(instants, following, strict=True)]
    mean = period / len(gaps)
    variance = sum(((gap - mean) ** 2 for gap in gaps), Fraction(0)) / len(gaps)
    return Flow(float(1 / mean), float(variance / mean**2), is_poisson=False)
