"""M/G/1/inf: Pollaczek and Khinchine's moments, and the whole distribution of the wait.

The wait is a geometric number of residual service times: W*(s) = (1−ρ)/(1−ρ Bₑ(s)), where
Bₑ is the transform of the time that a service still needs when somebody looks at random. It
is inverted numerically; written with Bₑ nothing cancels in heavy traffic.
"""

import math
from typing import Final

from molva.queueing.analytic._inversion import tail_by_inversion
from molva.queueing.analytic._residual import residual_transform
from molva.queueing.analytic.flows import output_of_single_server
from molva.queueing.analytic.orders import Waits, last_of_any_service, mean_square, ordered
from molva.queueing.distributions import (
    Distribution,
    Erlang,
    Exponential,
    Hyperexponential,
    LogNormal,
    Trace,
    Uniform,
    as_exponential,
)
from molva.queueing.errors import UnstableError
from molva.queueing.model import Bulk, Model, Renewal
from molva.queueing.result import CLOSED_FORM, NUMERICAL, SteadyState, Tail

__all__ = ["METHOD", "applies", "solve"]

METHOD: Final = "pollaczek-khinchine"
_SOURCE: Final = (
    "Pollaczek-Khinchine formula; Gross, Shortle, Thompson and Harris (2008), section 5.1; "
    "wait: Abate and Whitt (1995)"
)

# The inversion is exact to 1e-10 where the wait is smooth. Service times that jump, as those of
# a trace, put kinks into it, next to which so much is left for the error.
_JUMPY: Final = "numerical, error < 1e-3"

# Terms of the inversion for a uniform service time, whose edges put kinks into the second
# derivative of the wait: 60 leave an error of 1e-8, these of 1e-11.
_TERMS_OF_EDGES: Final = 2000
_TERMS: Final = 60


def applies(model: Model) -> bool:
    """Whether it is one server, all can wait, and arrivals are single and Poisson."""
    arrivals = model.arrivals
    return (
        model.servers == 1
        and model.waiting is None
        and not isinstance(model.service, Bulk)
        and isinstance(arrivals, Renewal)
        and arrivals.batch == 1
        and as_exponential(arrivals.gap) is not None
    )


def solve(model: Model) -> SteadyState:
    """Return the steady state of M/G/1/inf.

    Raises:
        UnstableError: ρ ≥ 1.
    """
    service = model.service
    assert not isinstance(service, Bulk)
    load = model.arrivals.rate * service.mean
    if load >= 1:
        raise UnstableError(
            str(model), arrival_rate=model.arrival_rate, capacity=model.service_rate
        )
    arrival, rho, idle = model.arrival_rate, float(load), float(1 - load)
    second, third = service.moment(2), service.moment(3)
    assert second is not None
    mean_wait = arrival * second / (2 * idle)
    squared = None if third is None else 2 * mean_wait**2 + arrival * third / (3 * idle)
    known = service.lst(1.0) is not None
    waits = _Waits(arrival, service, idle) if known else None
    fifo = model.discipline == "fifo"
    state = SteadyState(
        model=model,
        road=_road(service) if known and fifo else CLOSED_FORM,
        method=METHOD,
        source=_SOURCE,
        utilisation=rho,
        loss_probability=0.0,
        probability_of_waiting=rho,
        throughput=arrival,
        mean_wait=mean_wait,
        mean_squared_wait=squared,
        mean_time_in_system=mean_wait + float(service.mean),
        mean_waiting=arrival * mean_wait,
        mean_in_system=arrival * mean_wait + rho,
        wait=Tail(waits.wait_tail, mean_wait) if waits else None,
        time_in_system=Tail(waits.sojourn_tail, mean_wait) if waits else None,
        output=output_of_single_server(arrival, 1.0, service, mean_wait),
    )
    if fifo:
        return state
    squared = mean_square(model.discipline, squared, rho)
    if model.discipline == "lifo" and known:
        return ordered(state, last_of_any_service(arrival, service, rho, squared))
    return ordered(state, Waits(squared))


def _road(service: Distribution) -> str:
    return _JUMPY if isinstance(service, Trace) else NUMERICAL


class _Waits:
    """The wait and the time in system of M/G/1/inf, first come first served."""

    def __init__(self, arrival: float, service: Distribution, idle: float) -> None:
        self.service, self.idle, self.rho = service, idle, 1 - idle
        self.mean = float(service.mean)
        self.residual = residual_transform(service)
        self.decay = self._decay()
        self.terms = _TERMS_OF_EDGES if isinstance(service, Uniform) else _TERMS

    def _decay(self) -> float:
        """Return the rate η at which the tail falls: ρ Bₑ(−η) = 1; 0 where there is none."""
        service = self.service
        if isinstance(service, LogNormal):
            return 0.0
        low, high = 0.0, _abscissa(service) * (1 - 1e-12)
        if high == math.inf:
            high = 1 / self.mean
            while self.rho * self.residual(-high).real < 1:
                low, high = high, 2 * high
        while high - low > 1e-14 * high:
            middle = (low + high) / 2
            if not low < middle < high:
                break
            if self.rho * self.residual(-middle).real < 1:
                low = middle
            else:
                high = middle
        return low

    def wait_tail(self, t: float) -> float:
        if t == 0:
            return self.rho

        def transform(s: complex) -> complex:
            residual = self.residual(s)
            return self.rho * (1 - residual) / (s * (1 - self.rho * residual))

        return tail_by_inversion(transform, t, decay=self.decay, plain=self.terms)

    def sojourn_tail(self, t: float) -> float:
        if t == 0:
            return 1.0

        # (1 − W*B)/s, as (1 − W*)/s + W*(1 − B)/s.
        def transform(s: complex) -> complex:
            residual = self.residual(s)
            below = 1 - self.rho * residual
            waiting = self.rho * (1 - residual) / (s * below)
            return waiting + self.idle / below * self.mean * residual

        return tail_by_inversion(transform, t, decay=self.decay, plain=self.terms)


def _abscissa(service: Distribution) -> float:
    """Return how far to the left of 0 the transform exists."""
    match service:
        case Exponential():
            return 1 / float(service.mean)
        case Erlang():
            return service.phases / float(service.mean)
        case Hyperexponential():
            return 1 / max(mean for _, mean in service.branches)
    return math.inf
