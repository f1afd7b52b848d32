"""M/G/n/0 and G/G/inf: what only the mean of the service time decides.

Where nobody waits, the number present depends on the service time by its mean alone
(Erlang 1917 guessed it, Sevastyanov 1957 proved it). So does the loss.
"""

import math
from typing import Final

from molva.queueing.analytic.erlang import erlang_b
from molva.queueing.analytic.flows import loss_station_output
from molva.queueing.distributions import Distribution, as_deterministic, as_exponential
from molva.queueing.model import Bulk, Model, Renewal, Sinusoid
from molva.queueing.result import (
    CLOSED_FORM,
    Flow,
    Multiset,
    SteadyState,
    Tail,
    TimeLaw,
    nothing_waits,
)

__all__ = ["METHOD", "applies", "solve"]

METHOD: Final = "insensitive"
_SOURCE: Final = (
    "Erlang's B is that of any service time: Sevastyanov (1957); output of M/G/inf: Mirasol (1963)"
)


def applies(model: Model) -> bool:
    """Whether nobody waits: arrivals are single and Poisson, or servers enough for any."""
    if isinstance(model.service, Bulk) or isinstance(model.arrivals, Sinusoid):
        return False
    return model.servers is None or (model.waiting == 0 and _is_poisson(model))


def _is_poisson(model: Model) -> bool:
    arrivals = model.arrivals
    return (
        isinstance(arrivals, Renewal)
        and arrivals.batch == 1
        and as_exponential(arrivals.gap) is not None
    )


def solve(model: Model) -> SteadyState:
    """Return the steady state of M/G/n/0 or M/G/inf."""
    service, n = model.service, model.servers
    assert not isinstance(service, Bulk)
    arrival, a, mean = model.arrival_rate, model.offered_load, float(service.mean)
    loss = 0.0 if n is None else erlang_b(a, n)
    admitted = 1 - loss
    return SteadyState(
        model=model,
        road=CLOSED_FORM,
        method=METHOD,
        source=_SOURCE,
        utilisation=None if n is None else a * admitted / n,
        loss_probability=loss,
        probability_of_waiting=0.0,
        throughput=arrival * admitted,
        mean_wait=0.0,
        mean_squared_wait=0.0,
        mean_time_in_system=mean,
        mean_waiting=0.0,
        mean_in_system=a * admitted,
        wait=nothing_waits(),
        time_in_system=_service_law(service),
        output=_output(model, loss),
        refusals=None if n is None else Flow(arrival * loss),
    )


def _service_law(service: Distribution) -> TimeLaw | None:
    if as_deterministic(service) is not None:
        return Multiset((service.mean,))
    if as_exponential(service) is not None:
        mean = float(service.mean)
        return Tail(lambda t: math.exp(-t / mean), mean)  # to the far end, without 1 − cdf
    if service.cdf(1.0) is None:
        return None
    return Tail(lambda t: 1 - (service.cdf(t) or 0.0), float(service.mean))


def _output(model: Model, loss: float) -> Flow:
    """Return the output; of one server, each gap is an idle time and a service."""
    arrival, service = model.arrival_rate, model.service
    assert not isinstance(service, Bulk)
    rate = arrival * (1 - loss)
    if model.servers is None:
        return Flow(rate, 1.0, 1.0, True) if _is_poisson(model) else Flow(rate)
    if model.servers == 1:
        variance = 1 / arrival**2 + float(service.scv) * float(service.mean) ** 2
        return Flow(rate, variance * rate**2, is_poisson=False)
    return loss_station_output(arrival, service, model.servers, loss)
