"""M/M/n/q with all its limits: nobody may wait, all may, as many servers as jobs.

Everything is expressed by Erlang's B and by geometric sums of positive terms, so nothing
cancels and nothing overflows: ρ = 0.999999, n = 10⁶ and a loss of 1e-30 need no care.
1 − ρ is taken from exact fractions.
"""

import math
from dataclasses import dataclass, replace
from typing import Final

from molva.queueing.analytic import _poisson, insensitive
from molva.queueing.analytic.erlang import erlang_b
from molva.queueing.analytic.flows import birth_death_output, birth_death_refusals
from molva.queueing.analytic.mixtures import sojourn_tail
from molva.queueing.analytic.orders import (
    last_of_memoryless,
    lot_of_memoryless,
    lot_of_room,
    ordered,
    stack_of_room,
)
from molva.queueing.distributions import Exponential, as_exponential
from molva.queueing.errors import UnstableError
from molva.queueing.model import Model, Renewal
from molva.queueing.result import CLOSED_FORM, Flow, SteadyState, Tail, nothing_waits

__all__ = ["METHOD", "applies", "geometric", "solve"]

METHOD: Final = "birth-death"
_SOURCE: Final = (
    "Erlang's formulas; Gross, Shortle, Thompson and Harris, Fundamentals of Queueing Theory, "
    "4th ed. (2008), sections 2.3 to 2.6; output of M/M/n/inf: Burke (1956)"
)


def applies(model: Model) -> bool:
    """Whether arrivals and service are both without memory, one job at a time."""
    return _parts(model) is not None


def _parts(model: Model) -> tuple[Exponential, Exponential] | None:
    if not isinstance(model.arrivals, Renewal) or model.arrivals.batch != 1:
        return None
    gap, service = as_exponential(model.arrivals.gap), as_exponential(model.service)
    return None if gap is None or service is None else (gap, service)


def solve(model: Model) -> SteadyState:
    """Return the steady state of M/M/n/q.

    Raises:
        UnstableError: All can wait, and λ ≥ nμ.
    """
    if model.servers is None:
        return _infinite_servers(model)
    if model.waiting is None:
        return _all_can_wait(model, model.servers)
    return _bounded(model, model.servers, model.waiting)


def _infinite_servers(model: Model) -> SteadyState:
    # Nobody waits, so the law of the service does not matter; this one is of this method.
    return replace(insensitive.solve(model), method=METHOD, source=_SOURCE)


def _all_can_wait(model: Model, n: int) -> SteadyState:
    load = model.arrivals.rate * model.service.mean
    arrival, service = model.arrival_rate, model.service_rate
    if load >= n:
        raise UnstableError(str(model), arrival_rate=arrival, capacity=n * service)
    a, free = float(load), float(n - load)
    b = erlang_b(a, n)
    waiting = n * b / (free + a * b)  # Erlang's C
    drain = free * service  # nμ − λ, without the cancellation
    mean_wait = waiting / drain
    squared = 2 * waiting / drain**2
    state = SteadyState(
        model=model,
        road=CLOSED_FORM,
        method=METHOD,
        source=_SOURCE,
        utilisation=a / n,
        loss_probability=0.0,
        probability_of_waiting=waiting,
        throughput=arrival,
        mean_wait=mean_wait,
        mean_squared_wait=squared,
        mean_time_in_system=mean_wait + 1 / service,
        mean_waiting=arrival * mean_wait,
        mean_in_system=arrival * mean_wait + a,
        wait=Tail(lambda t: waiting * math.exp(-drain * t), 1 / drain),
        time_in_system=Tail(lambda t: sojourn_tail(t, waiting, drain, service), 1 / service),
        output=Flow(arrival, 1.0, 1.0, True),
    )
    if model.discipline == "fifo":
        return state
    if model.discipline == "random":
        order = lot_of_memoryless(service, n, waiting, free / n, squared * 2 / (2 - a / n))
    else:
        order = last_of_memoryless(arrival, service, n, waiting, squared / (free / n))
    return ordered(state, order)


def _bounded(model: Model, n: int, q: int) -> SteadyState:
    arrival, service = model.arrival_rate, model.service_rate
    a = model.offered_load
    rho = float(model.arrivals.rate * model.service.mean / n)
    room = _waiting_room(erlang_b(a, n), rho, q)
    full, admitted = room.full, 1 - room.full
    mean_wait = room.mean_waiting / (arrival * admitted)
    places = _Places(n, q, rho, room.first / admitted)
    mean_service = 1 / service
    fifo = model.discipline == "fifo" or q <= 1
    wait = Tail(lambda t: places.wait_tail(n * service * t), mean_service / n)
    sojourn = Tail(lambda t: places.sojourn_tail(n * service * t), mean_service)
    state = SteadyState(
        model=model,
        road=CLOSED_FORM,
        method=METHOD,
        source=_SOURCE,
        utilisation=rho * admitted,
        loss_probability=full,
        probability_of_waiting=room.busy / admitted,
        throughput=arrival * admitted,
        mean_wait=mean_wait,
        mean_squared_wait=room.places / admitted / (n * service) ** 2,
        mean_time_in_system=mean_wait + mean_service,
        mean_waiting=room.mean_waiting,
        mean_in_system=room.mean_waiting + a * admitted,
        wait=wait if q else nothing_waits(),
        time_in_system=sojourn,
        output=birth_death_output(arrival, service, n, q, arrival * admitted),
        refusals=birth_death_refusals(arrival, service, n, q, full),
    )
    if fifo:
        return state
    waiting = room.busy / admitted
    of_room = stack_of_room if model.discipline == "lifo" else lot_of_room
    return ordered(state, of_room(arrival, service, n, q, places.weight, waiting))


def _waiting_room(b: float, rho: float, q: int) -> "_Room":
    """Return how full the waiting room is, from Erlang's B of the servers.

    States are counted from the likelier end: from the last server where ρ ≤ 1, from the last
    waiting place where ρ > 1, so that no power overflows.
    """
    if rho <= 1:
        s0, s1, s2 = geometric(rho, q)
        # b is 0 where it is below the smallest double: so is all that follows from it.
        all_busy = 1 / (1 / b + rho * s0) if b > 0 else 0.0
        return _Room(
            full=all_busy * rho**q,
            first=all_busy,
            busy=all_busy * s0,
            mean_waiting=all_busy * rho * (s0 + s1),
            places=all_busy * (s2 + 3 * s1 + 2 * s0),
        )
    s0, s1, s2 = geometric(1 / rho, q)
    full = 1 / (s0 + rho**-q / b)
    return _Room(
        full=full,
        first=full / rho,
        busy=full / rho * s0,
        mean_waiting=full * (q * s0 - s1),
        places=full / rho * ((q * q + q) * s0 - (2 * q + 1) * s1 + s2),
    )


def geometric(ratio: float, terms: int) -> tuple[float, float, float]:
    """Return Σ ratioᵐ, Σ m ratioᵐ and Σ m² ratioᵐ over 0 ≤ m < terms, for 0 ≤ ratio ≤ 1.

    By doubling: the closed forms divide by powers of 1 − ratio, and near 1 keep no digit.
    """
    s0 = s1 = s2 = 0.0
    power = 1.0  # ratio to the number of terms summed so far
    count = 0
    for bit in bin(terms)[2:]:
        s2 += power * (s2 + 2 * count * s1 + count * count * s0)
        s1 += power * (s1 + count * s0)
        s0 += power * s0
        power, count = power * power, 2 * count
        if bit == "1":
            s0, s1, s2 = s0 + power, s1 + count * power, s2 + count * count * power
            power, count = power * ratio, count + 1
    return s0, s1, s2


@dataclass(frozen=True, slots=True)
class _Room:
    """Probabilities of the states in which all servers are busy.

    Attributes:
        full: All places are taken.
        first: The likeliest state that leads to a wait: no place taken where ρ ≤ 1, all but
            one where ρ > 1.
        busy: An arrival is admitted and waits.
        mean_waiting: Jobs that wait.
        places: Σ m(m+1) over the place m that an arrival takes, each with its probability.
    """

    full: float
    first: float
    busy: float
    mean_waiting: float
    places: float


class _Places:
    """The wait of those admitted to M/M/n/q: a mixture over the place m that they take.

    A job that takes place m (1 ≤ m ≤ q) waits for m departures. The probability of place m is
    geometric in m, with the ratio ρ.
    """

    def __init__(self, n: int, q: int, rho: float, first: float) -> None:
        self.n, self.q, self.rho, self.first = n, q, rho, first
        self.likeliest = 1 if rho <= 1 else q

    def weight(self, place: float) -> float:
        return self.first * math.pow(self.rho, place - self.likeliest)

    def beyond(self, i: float) -> float:
        """Return P(place > i)."""
        if i >= self.q:
            return 0.0
        if self.rho <= 1:
            return self.weight(i + 1) * _powers(self.q - i, math.log(self.rho))
        return self.weight(self.q) * _powers(self.q - i, -math.log(self.rho))

    def held(self, i: float) -> float:
        """Return the share that, when i departures have come, is served and not gone.

        A job that took place m began at the m-th departure. It has survived each of the i − m
        since with the probability (n−1)/n: they were of one of the n busy servers.
        """
        m = min(i, self.q)
        if m == 0:
            return 0.0
        if self.n == 1:
            return self.weight(i) if i <= self.q else 0.0
        # Σ weight(j) stay^(i−j) over 1 ≤ j ≤ m, from its larger end.
        stay = (self.n - 1) / self.n
        log_ratio = math.log1p(-1 / self.n) - math.log(self.rho)
        if log_ratio <= 0:
            return self.weight(m) * math.pow(stay, i - m) * _powers(m, log_ratio)
        return self.weight(1) * math.pow(stay, i - 1) * _powers(m, -log_ratio)

    def wait_tail(self, x: float) -> float:
        """Return P(W > t), x = nμt."""
        return _poisson.smooth_expectation(x, self.beyond, self.q)

    def sojourn_tail(self, x: float) -> float:
        """Return P(W + S > t), x = nμt."""
        straight = (1 - self.beyond(0)) * math.exp(-x / self.n)
        if not self.q:
            return straight
        return straight + _poisson.smooth_expectation(
            x, lambda i: self.beyond(i) + self.held(i), self.q
        )


def _powers(terms: float, log_ratio: float) -> float:
    """Return Σ e^(log_ratio · m) over 0 ≤ m < terms, log_ratio ≤ 0."""
    if abs(log_ratio) * terms < 1e-9:
        return terms * (1 + log_ratio * (terms - 1) / 2)
    return math.expm1(log_ratio * terms) / math.expm1(log_ratio)
