"""G/M/n/inf: arrivals with any independent gaps, service without memory.

An arrival that has to wait finds a geometric number before it, with the ratio σ that solves
σ = A*(nμ(1−σ)); its wait is exponential. Takács' sum gives how often it has to wait.
"""

import math
from collections.abc import Callable
from typing import Final

from molva.queueing.analytic._residual import residual_transform
from molva.queueing.analytic.flows import output_of_single_server
from molva.queueing.analytic.mixtures import sojourn_tail
from molva.queueing.analytic.orders import Waits, last_of_any_gaps, ordered
from molva.queueing.distributions import Distribution, Exponential, as_exponential
from molva.queueing.errors import UnstableError
from molva.queueing.model import Model, Renewal
from molva.queueing.result import NUMERICAL, Flow, SteadyState, Tail

__all__ = ["METHOD", "applies", "root", "solve"]

METHOD: Final = "takacs"
_SOURCE: Final = "Takács, Introduction to the Theory of Queues (1962), chapter 2"

# |nδ − j| below which a quotient of two zeros is taken as a slope. Larger, and the slope at
# the middle is off by more than 1e-10; smaller, and the quotient is.
_TOUCHING: Final = 1e-5


def applies(model: Model) -> bool:
    """Whether gaps are independent and known, service is exponential and all can wait."""
    return (
        model.servers is not None
        and model.waiting is None
        and as_exponential(model.service) is not None
        and isinstance(model.arrivals, Renewal)
        and model.arrivals.batch == 1
        and model.arrivals.gap.lst(1.0) is not None
    )


def solve(model: Model) -> SteadyState:
    """Return the steady state of G/M/n/inf.

    Raises:
        UnstableError: λ ≥ nμ.
    """
    n, arrivals = model.servers, model.arrivals
    service = as_exponential(model.service)
    assert n is not None
    assert isinstance(arrivals, Renewal)
    assert isinstance(service, Exponential)
    load = arrivals.rate * service.mean
    arrival, mu = model.arrival_rate, model.service_rate
    if load >= n:
        raise UnstableError(str(model), arrival_rate=arrival, capacity=n * mu)

    def transform(s: float) -> float:
        value = arrivals.gap.lst(s)
        assert value is not None
        return value.real

    rho = float(load / n)
    # δ = 1 − σ, because σ itself is close to 1 in heavy traffic.
    delta = _delta(arrivals.gap, rho, n * mu)
    waiting = _probability_of_waiting(transform, n, mu, delta)
    drain = n * mu * delta
    mean_wait = waiting / drain
    state = SteadyState(
        model=model,
        road=NUMERICAL,
        method=METHOD,
        source=_SOURCE,
        utilisation=rho,
        loss_probability=0.0,
        probability_of_waiting=waiting,
        throughput=arrival,
        mean_wait=mean_wait,
        mean_squared_wait=2 * waiting / drain**2,
        mean_time_in_system=mean_wait + 1 / mu,
        mean_waiting=arrival * mean_wait,
        mean_in_system=arrival * mean_wait + float(load),
        wait=Tail(lambda t: waiting * math.exp(-drain * t), 1 / drain),
        time_in_system=Tail(lambda t: sojourn_tail(t, waiting, drain, mu), 1 / mu),
        output=output_of_single_server(arrival, float(arrivals.gap.scv), service, mean_wait)
        if n == 1
        else Flow(arrival),
    )
    if model.discipline == "fifo":
        return state
    if model.discipline == "lifo" and waiting > 0:
        return ordered(state, last_of_any_gaps(arrivals.gap, mu, n, waiting, drain))
    return ordered(state, Waits())


def root(model: Model) -> float:
    """Return σ: an arrival that waits finds one job more with this probability."""
    assert isinstance(model.arrivals, Renewal)
    assert model.servers is not None
    rho = model.offered_load / model.servers
    return 1 - _delta(model.arrivals.gap, rho, model.servers * model.service_rate)


def _delta(gap: Distribution, rho: float, capacity: float) -> float:
    """Return 1 − σ, the root δ of 1 − δ = A*(capacity · δ) in (0, 1).

    With the residual of the gaps that is Aₑ(capacity · δ) = ρ, which falls in δ and keeps its
    digits where δ is small: there σ itself would be 1 but for rounding.
    """
    residual = residual_transform(gap)
    low, high = 0.0, 1.0
    while high - low > 2e-16 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if residual(capacity * middle).real > rho:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _probability_of_waiting(
    transform: Callable[[float], float], n: int, mu: float, delta: float
) -> float:
    """Return P(W > 0) by Takács' sum, all terms of which are positive."""

    def excess(x: float) -> float:
        return n * (1 - transform(x * mu)) - x

    terms = []
    log_product = 0.0  # of φ_i/(1−φ_i) up to j
    for j in range(1, n + 1):
        phi = transform(j * mu)
        if phi == 0.0:
            # All later terms are infinite: to find all servers busy is below any double.
            return 0.0
        log_product += math.log(phi) - math.log1p(-phi)
        choose = math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1)
        gap = n * delta - j
        if abs(gap) > _TOUCHING:
            ratio = excess(j) / gap
        else:
            # ``excess`` is 0 at nδ: the quotient is a slope, at the middle of the two.
            at, h = (n * delta + j) / 2, 1e-2
            near = excess(at - h) - excess(at + h)
            far = excess(at - 2 * h) - excess(at + 2 * h)
            ratio = (8 * near - far) / (12 * h)
        log_term = choose - log_product
        if log_term > 700:
            return 0.0
        terms.append(math.exp(log_term) / (1 - phi) * ratio)
    return 1 / (1 + delta * math.fsum(terms))
