"""M^X/M/n/q: several jobs at each instant of a Poisson flow, exponential service.

The number present goes up in jumps and down one by one, so the flow down over each level equals
the flow up: one probability after the other follows by additions alone. Where all can wait they
end in a geometric tail, whose ratio solves an equation of its own, so that heavy traffic costs
nothing. Jobs that arrive together are admitted one by one, until the room is full.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from molva.queueing.analytic.flows import memoryless_output_scv, scv_from_next
from molva.queueing.analytic.places import Places
from molva.queueing.distributions import as_exponential
from molva.queueing.errors import NoAnalysisError, UnstableError
from molva.queueing.model import Model, Renewal
from molva.queueing.result import NUMERICAL, Flow, SteadyState, nothing_waits

__all__ = ["METHOD", "applies", "solve"]

METHOD: Final = "batches"
_SOURCE: Final = "level crossings; M^X/M/1: Gross, Shortle, Thompson and Harris (2008), section 3.1"

# States times jobs in a batch, beyond which the chain takes more than a second or two; and
# those beyond which the walk over them for the flow of refusals does.
_MOST_WORK: Final = 3_000_000
_MOST_WALKED: Final = 300_000

# Relative change of the ratio of neighbours at which only the geometric end is left.
_SETTLED: Final = 1e-14


def applies(model: Model) -> bool:
    """Whether batches arrive without memory and service is exponential."""
    arrivals = model.arrivals
    return (
        model.servers is not None
        and isinstance(arrivals, Renewal)
        and arrivals.batch > 1
        and as_exponential(arrivals.gap) is not None
        and as_exponential(model.service) is not None
    )


def solve(model: Model) -> SteadyState:
    """Return the steady state of M^X/M/n/q.

    Raises:
        UnstableError: All can wait, and λ ≥ nμ.
        NoAnalysisError: The chain has more states than are solved here.
    """
    arrivals, n, q = model.arrivals, model.servers, model.waiting
    assert isinstance(arrivals, Renewal)
    assert n is not None
    events = 1 / float(arrivals.gap.mean)
    station = _Station(events, arrivals.batch, model.service_rate, n)
    if q is None and model.arrivals.rate * model.service.mean >= n:
        capacity = n * station.service
        raise UnstableError(str(model), arrival_rate=model.arrival_rate, capacity=capacity)
    most = _MOST_WORK // arrivals.batch
    if n + (q or 0) > most:
        raise NoAnalysisError(
            f"{model} has {n + (q or 0)} states, and at most {most} are solved here; take "
            "fewer servers or waiting places"
        )
    return _all_can_wait(model, station) if q is None else _bounded(model, station, q)


@dataclass(frozen=True, slots=True)
class _Station:
    """``events`` batches of ``batch`` jobs per second, and the servers."""

    events: float
    batch: int
    service: float
    servers: int

    def chain(self, enough: Callable[[list[float]], bool]) -> list[float]:
        """Return P(0, 1 … present), not normalised, until they are enough."""
        p = [1.0]
        while not enough(p):
            # From these states the next batch leads over the level.
            entering = math.fsum(p[-self.batch :])
            p.append(self.events * entering / (min(len(p), self.servers) * self.service))
            if p[-1] > 1e200:
                p = [each / 1e200 for each in p]
        return p

    def found(self, p: list[float]) -> list[float]:
        """Return P(a job finds i before it), those of its batch among them."""
        return [
            math.fsum(p[max(0, i + 1 - self.batch) : i + 1]) / self.batch for i in range(len(p))
        ]


def _all_can_wait(model: Model, station: _Station) -> SteadyState:
    n, mu = station.servers, station.service
    load = model.arrivals.rate * model.service.mean
    arrival, a, free = model.arrival_rate, float(load), float(n - load)
    excess = _excess(station, free)
    p = station.chain(lambda p: _has_settled(p, n + station.batch, 1 / (1 + excess)))
    # In the mean ``free`` servers are idle, which fixes the scale.
    scale = free / math.fsum((n - k) * each for k, each in enumerate(p[:n]))
    p = [each * scale for each in p]
    # The second moment stands still: d E[N²]/dt = 0.
    below = math.fsum(k * (n - k) * each for k, each in enumerate(p[:n]))
    up = station.events * station.batch**2 / mu
    in_system = (up + a + 2 * below) / (2 * free)
    waiting = max(0.0, in_system - a)
    found = station.found(p)
    line = Places(n, mu, math.fsum(found[:n]), found[n:], excess)
    return SteadyState(
        model=model,
        road=NUMERICAL,
        method=METHOD,
        source=_SOURCE,
        utilisation=a / n,
        loss_probability=0.0,
        probability_of_waiting=line.beyond(0),
        throughput=arrival,
        mean_wait=waiting / arrival,
        mean_squared_wait=line.squared() if model.discipline == "fifo" else None,
        mean_time_in_system=in_system / arrival,
        mean_waiting=waiting,
        mean_in_system=in_system,
        wait=line.wait() if model.discipline == "fifo" else None,
        time_in_system=line.time_in_system() if model.discipline == "fifo" else None,
        output=_output(station, p, arrival, a),
    )


def _excess(station: _Station, free: float) -> float:
    """Return u with nμ = events · Σ (1+u)ʲ over 1 ≤ j ≤ batch, less its value at u = 0."""
    events, batch = station.events / station.service, station.batch

    def over(u: float) -> float:
        # Σ (1+u)ʲ − 1, written so that nothing cancels near 0.
        grown = batch * math.log1p(u)
        if grown > 600:
            return math.inf
        power = math.expm1(grown)
        if u * batch < 1e-5:
            return events * u * batch * (batch + 1) / 2 * (1 + u * (batch - 1) / 3)
        return events * ((1 + u) * power / u - batch)

    low, high = 0.0, 1.0
    while over(high) < free:
        low, high = high, 2 * high
    while high - low > 2e-16 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if over(middle) < free else (low, middle)
    return (low + high) / 2


def _has_settled(p: list[float], least: int, ratio: float) -> bool:
    if len(p) <= least + 1:
        return False
    if p[-1] < 1e-290:
        return True
    return (
        abs(p[-1] - ratio * p[-2]) <= _SETTLED * p[-1]
        and abs(p[-2] - ratio * p[-3]) <= _SETTLED * p[-2]
    )


def _bounded(model: Model, station: _Station, q: int) -> SteadyState:
    n, mu, batch = station.servers, station.service, station.batch
    top = n + q
    p = station.chain(lambda p: len(p) > top)
    total = math.fsum(p)
    p = [each / total for each in p]
    arrival, a = model.arrival_rate, model.offered_load
    refused = [max(0, k + batch - top) for k in range(top + 1)]
    loss = math.fsum(each * r for each, r in zip(p, refused, strict=True)) / batch
    admitted = 1 - loss
    waiting = math.fsum((k - n) * each for k, each in enumerate(p) if k > n)
    throughput = arrival * admitted
    found = [each / admitted for each in station.found(p)[:top]]
    line = Places(n, mu, math.fsum(found[:n]), found[n:])
    fifo = model.discipline == "fifo" or q == 0
    mean_wait = waiting / throughput
    return SteadyState(
        model=model,
        road=NUMERICAL,
        method=METHOD,
        source=_SOURCE,
        utilisation=a * admitted / n,
        loss_probability=loss,
        probability_of_waiting=line.beyond(0),
        throughput=throughput,
        mean_wait=mean_wait,
        mean_squared_wait=line.squared() if fifo else None,
        mean_time_in_system=mean_wait + 1 / mu,
        mean_waiting=waiting,
        mean_in_system=waiting + a * admitted,
        wait=(line.wait() if q else nothing_waits()) if fifo else None,
        time_in_system=line.time_in_system() if fifo else None,
        output=_output(station, p, throughput, a * admitted),
        refusals=_refusals(station, p, refused, arrival * loss),
    )


def _output(station: _Station, p: list[float], throughput: float, busy: float) -> Flow:
    """Return the output, from how often a departure leaves each number behind."""
    n = station.servers
    leaves = [(k + 1) * p[k + 1] if k + 1 < len(p) else 0.0 for k in range(n)]
    scv = memoryless_output_scv(
        station.events,
        station.service,
        0,
        leaves,
        max(0.0, busy - math.fsum(leaves)),
        n,
        batch=station.batch,
    )
    return Flow(throughput, scv, is_poisson=False)


def _refusals(station: _Station, p: list[float], refused: list[int], rate: float) -> Flow:
    """Return the overflow: as many as do not fit are refused at one instant."""
    if rate == 0 or len(p) * station.batch > _MOST_WALKED:
        return Flow(rate, is_poisson=False)
    events = station.events
    until = _expected(
        station,
        reward=[1.0] * len(p),
        ends=[events if r else 0.0 for r in refused],
        jumps=[not r for r in refused],
    )
    next_refusal = math.fsum(each * time for each, time in zip(p, until, strict=True))
    # Refusals after one refusal, each with the chance that the first is still served: those of
    # its own batch, and those that the full station has yet to come.
    pairs = math.fsum(each * r * (r - 1) / 2 for each, r in zip(p, refused, strict=True))
    alone = math.fsum(each * r for each, r in zip(p, refused, strict=True))
    later = _expected(
        station,
        reward=[events * r for r in refused],
        ends=[station.service] * len(p),
        jumps=[True] * len(p),
    )
    after = pairs / alone + later[-1]
    return Flow(
        rate,
        scv=scv_from_next(rate, next_refusal),
        peakedness=1 + after - rate / station.service,
        is_poisson=False,
    )


def _expected(
    station: _Station, reward: list[float], ends: list[float], jumps: list[bool]
) -> list[float]:
    """Return the mean reward until the end, from each number present.

    States are eliminated from below, by additions alone; see ``finite_flows.first_passages``.

    Args:
        station: Its batches lead up, as far as there is room, its servers down.
        reward: Per second, in each state.
        ends: Rate at which it ends, in each state.
        jumps: Whether a batch leads up from it.
    """
    top, batch = len(reward) - 1, station.batch
    ups: list[list[float]] = []
    leaves: list[float] = []
    gained: list[float] = []
    end = 0.0
    for k in range(top + 1):
        up = [0.0] * (batch + 1)
        reach = min(batch, top - k)
        if jumps[k] and reach:
            up[reach] = station.events
        gain, ending = reward[k], ends[k]
        if k:
            down = min(k, station.servers) * station.service / leaves[-1]
            for j in range(1, batch):
                up[j] += down * ups[-1][j + 1]
            ending += down * end
            gain += down * gained[-1]
        end = ending
        ups.append(up)
        leaves.append(math.fsum(up) + ending)
        gained.append(gain)
    expected = [0.0] * (top + 1)
    for k in range(top, -1, -1):
        reach = min(batch, top - k)
        more = math.fsum(ups[k][j] * expected[k + j] for j in range(1, reach + 1))
        expected[k] = (gained[k] + more) / leaves[k]
    return expected
